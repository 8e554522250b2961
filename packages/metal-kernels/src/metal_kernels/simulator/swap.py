"""Puts the simulated `metal_kernel` in the place of MLX's, and back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .kernel import metal_kernel
from .toolchain import toolchain

_MLX_IS_AVAILABLE = mx.metal.is_available
_replaced: list[tuple[Any, str, Any]] = []


def install(*, pretend_metal: bool = False) -> None:
    """Make `mx.fast.metal_kernel` simulate, for kernels created from now on; does nothing where Metal is available.

    `mx.compile` is switched off: compiled functions would call kernels with arrays that have no values.

    Args:
        pretend_metal: Whether MLX says that Metal is there and the GPU the default device, for code that asks
            before it uses a kernel. Streams asked of the GPU are the CPU's.

    Raises:
        ToolchainError: No usable clang is installed.
    """
    if _MLX_IS_AVAILABLE():
        return
    if not is_installed():
        toolchain()
        _replace(mx.fast, "metal_kernel", metal_kernel)
        mx.disable_compile()
    if pretend_metal and not mx.metal.is_available():
        _pretend()


def uninstall() -> None:
    """Undo `install`."""
    _restore(0)


def _restore(count: int) -> None:
    """Undo all replacements but the first ``count``."""
    if is_installed() and count == 0:
        mx.enable_compile()
    while len(_replaced) > count:
        setattr(*_replaced.pop())


def is_installed() -> bool:
    """Whether new kernels are simulated."""
    return mx.fast.metal_kernel is metal_kernel


@contextmanager
def installed(*, pretend_metal: bool = False) -> Iterator[None]:
    """`install` for the length of a ``with`` block; what was installed before remains."""
    before = len(_replaced)
    install(pretend_metal=pretend_metal)
    try:
        yield
    finally:
        _restore(before)


def _replace(module: Any, name: str, function: object) -> None:
    _replaced.append((module, name, getattr(module, name)))
    setattr(module, name, function)


def _pretend() -> None:
    """Let MLX say what it says on a Mac; what is asked to run on the GPU runs on the CPU."""
    chosen = [mx.Device(mx.gpu)]
    _replace(mx.metal, "is_available", lambda: True)
    _replace(mx, "is_available", lambda _: True)
    _replace(mx, "default_device", lambda: chosen[0])
    _replace(mx, "set_default_device", lambda device: chosen.__setitem__(0, _device(device)))
    for name in ("default_stream", "new_stream", "new_thread_local_stream", "new_thread_unsafe_stream", "stream"):
        _replace(mx, name, _on_cpu(getattr(mx, name)))


def _device(device: Any) -> mx.Device:
    return device if isinstance(device, mx.Device) else mx.Device(device)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of a device or a stream, which takes the GPU for the CPU."""

    def call(device: Any) -> Any:
        return function(mx.cpu if not isinstance(device, mx.Stream) and _device(device) == mx.gpu else device)

    return call
