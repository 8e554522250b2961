"""The Metal source that MLX generates for a kernel call, taken from MLX itself."""

import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import KernelCompileError, SimulatorError
from .unit import Source

MLX_METAL_KERNEL: Callable[..., Any] = mx.fast.metal_kernel
_PREAMBLE = '#include "mlx/backend/metal/kernels/utils.h"'
_KERNEL_NAME = re.compile(r"\[\[kernel\]\]\s*void (\w+)\(")
_stdout_lock = threading.Lock()


@dataclass(frozen=True)
class Generated:
    """What MLX would hand to Metal's compiler; ``kernel`` is the function's host name."""

    kernel: str
    text: str
    source: Source


def mlx_include_directory() -> str:
    """Where the installed MLX keeps the headers that its kernels include."""
    return str(Path(mx.__file__).parent / "include")


def generated_source(
    kernel: Callable[..., Any],
    name: str,
    header: str,
    body: str,
    inputs: Sequence[mx.array],
    call: dict[str, Any],
    defines: tuple[str, ...] = (),
) -> Generated:
    """Let MLX generate the source of one call without running it.

    Args:
        kernel: What `mx.fast.metal_kernel` returned.
        name: Its name, which diagnostics of the body's lines carry.
        header: As given to MLX.
        body: As given to MLX.
        inputs: Their dtypes and sizes are part of the source.
        call: The other arguments of the call.
        defines: Macros that Metal's compiler would be started with.

    Raises:
        KernelCompileError: The name cannot be a part of a function's.
        SimulatorError: MLX printed no source.
    """
    with tempfile.TemporaryDirectory() as folder:
        printed = _printed(
            lambda: mx.export_function(
                f"{folder}/kernel.mlxfn",
                lambda *arrays: kernel(inputs=list(arrays), **call, verbose=True),
                *inputs,
            )
        )
    fence = printed.find("```\n")
    if fence < 0:
        raise SimulatorError(f"[simulator] expected MLX to print the source of '{name}', got: {printed[:200]!r}.")
    text = printed[fence + 4 : printed.rindex("\n```")]
    names = _KERNEL_NAME.findall(text)
    if not names:
        raise KernelCompileError(
            f"[simulator] expected a kernel name of letters, digits and '_', got '{name}'. "
            "MLX makes it a part of the function's name."
        )
    source = Source(_parts(name, header, body, text), (mlx_include_directory(),), defines, preamble=_PREAMBLE)
    return Generated(names[-1], text, source)


def _parts(name: str, header: str, body: str, text: str) -> tuple[tuple[str, str], ...]:
    parts: list[tuple[str, str]] = []
    if header and text.startswith(header):
        parts.append((f"{name}.header", header))
        text = text[len(header) :]
    at = text.rfind(body) if body.strip() else -1
    if at < 0:
        return (*parts, (f"{name}.generated", text))
    return (*parts, (f"{name}.signature", text[:at]), (name, body), (f"{name}.end", text[at + len(body) :]))


def _printed(action: Callable[[], object]) -> str:
    """What ``action`` writes to the process's standard output, from C++ too."""
    with _stdout_lock, tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            action()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode()
