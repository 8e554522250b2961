"""A missing or old clang is told in one sentence with the command that installs one."""

import pytest

from metal_kernels.simulator import ToolchainError
from metal_kernels.simulator.toolchain import toolchain


@pytest.fixture
def fresh():
    """`toolchain` without its memory, before and after."""
    toolchain.cache_clear()
    yield
    toolchain.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_old_clang(tmp_path, monkeypatch):
    clang = tmp_path / "clang++"
    clang.write_text('#!/bin/sh\necho "Debian clang version 14.0.6"\n')
    clang.chmod(0o755)
    (tmp_path / "ld.lld").touch()
    monkeypatch.setenv("METAL_KERNELS_CLANG", str(clang))
    with pytest.raises(ToolchainError, match=r"expected clang 19 or newer, got clang 14\.0\.6\. Run `pip install"):
        toolchain()


@pytest.mark.usefixtures("fresh")
def test_missing_clang(monkeypatch, tmp_path):
    (tmp_path / "ld.lld").touch()
    monkeypatch.setenv("METAL_KERNELS_CLANG", str(tmp_path / "none"))
    with pytest.raises(ToolchainError, match="pip install 'metal-kernels"):
        toolchain()


def test_version_is_recent_enough():
    assert int(toolchain().version.split(".")[0]) >= 19
