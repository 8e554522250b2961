"""The wheel's reference BLAS is replaced, and the replacement computes the same."""

import subprocess
import sys
from importlib.metadata import files

import pytest

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="MLX uses Accelerate on a Mac")


@LINUX
def test_workaround_is_still_needed() -> None:
    """Fails when the mlx-cpu wheel stops carrying netlib's libblas: then blas.py can go."""
    assert any(path.name.startswith("libblas") for path in files("mlx-cpu") or [])


@LINUX
def test_matmul_is_right_with_whatever_was_found() -> None:
    program = (
        "import metal_kernels, numpy as np, mlx.core as mx\n"
        "a = np.random.default_rng(0).normal(size=(33, 70)).astype('f'); b = a.T.copy()\n"
        "np.testing.assert_allclose(np.array(mx.array(a) @ mx.array(b)), a @ b, rtol=1e-4, atol=1e-4)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@LINUX
def test_says_when_it_comes_too_late() -> None:
    program = "import mlx.core; from metal_kernels.blas import prefer_fast_blas; print(prefer_fast_blas())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("too late")
