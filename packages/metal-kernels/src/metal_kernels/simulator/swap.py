"""Puts the simulated `metal_kernel` in the place of MLX's, and back."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .capture import MLX_METAL_KERNEL
from .kernel import metal_kernel
from .toolchain import toolchain

_MLX_IS_AVAILABLE = mx.metal.is_available


def install(*, pretend_metal: bool = False) -> None:
    """Make `mx.fast.metal_kernel` simulate, for kernels created from now on; does nothing where Metal is available.

    `mx.compile` is switched off: compiled functions would call kernels with arrays that have no values.

    Args:
        pretend_metal: Whether `mx.metal.is_available` answers yes, for code that asks before it uses a kernel.

    Raises:
        ToolchainError: No usable clang is installed.
    """
    if _MLX_IS_AVAILABLE():
        return
    toolchain()
    mx.fast.metal_kernel = metal_kernel
    if pretend_metal:
        mx.metal.is_available = lambda: True
    mx.disable_compile()


def uninstall() -> None:
    """Undo `install`."""
    if is_installed():
        mx.fast.metal_kernel = MLX_METAL_KERNEL
        mx.metal.is_available = _MLX_IS_AVAILABLE
        mx.enable_compile()


def is_installed() -> bool:
    """Whether new kernels are simulated."""
    return mx.fast.metal_kernel is metal_kernel


@contextmanager
def installed(*, pretend_metal: bool = False) -> Iterator[None]:
    """`install` for the length of a ``with`` block."""
    install(pretend_metal=pretend_metal)
    try:
        yield
    finally:
        uninstall()
