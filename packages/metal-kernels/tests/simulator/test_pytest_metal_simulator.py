"""The plugin swaps the simulator in for a project that asks for it, before its modules are imported."""

import subprocess
import sys
from textwrap import dedent

import pytest

PROJECT = """
    import mlx.core as mx

    kernel = mx.fast.metal_kernel(  # at import time
        name="twice", input_names=["x"], output_names=["out"],
        source="uint i = thread_position_in_grid.x; out[i] = 2 * x[i];",
    )

    def test_twice():
        x = mx.arange(10)
        (out,) = kernel(
            inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype], grid=(10, 1, 1), threadgroup=(10, 1, 1)
        )
        assert (out == 2 * x).all().item()

    def test_metal_is_available():
        assert mx.metal.is_available() == {pretended}
        assert (mx.default_device() == mx.gpu) == {pretended}
        with mx.stream(mx.default_device()):
            assert (mx.ones(2) + 1).tolist() == [2, 2]
"""


@pytest.fixture
def run(tmp_path):
    """Run a small project's tests in a process of their own; returns exit status and output."""

    def go(ini: str, *arguments: str, pretended: bool = False) -> tuple[int, str]:
        (tmp_path / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
        (tmp_path / "test_project.py").write_text(dedent(PROJECT).format(pretended=pretended))
        command = [sys.executable, "-m", "pytest", "-p", "pytest_metal_simulator", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return go


def test_switched_on_by_the_project(run):
    status, output = run("metal_simulator = true")
    assert status == 0, output
    assert "metal kernels: simulated" in output


def test_switched_on_by_the_command_line(run):
    status, output = run("", "--metal-simulator", "--metal-simulator-fast")
    assert status == 0, output


def test_pretends_that_metal_is_available(run):
    status, output = run("metal_simulator = true\nmetal_simulator_pretend_metal = true", pretended=True)
    assert status == 0, output


def test_off_by_default(run):
    status, output = run("")
    assert status == 1
    assert "No Metal back-end" in output


def test_imports_nothing_unless_asked(tmp_path):
    (tmp_path / "test_project.py").write_text("import sys\ndef test_it(): assert 'metal_kernels' not in sys.modules\n")
    command = [sys.executable, "-m", "pytest", "-p", "pytest_metal_simulator"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
