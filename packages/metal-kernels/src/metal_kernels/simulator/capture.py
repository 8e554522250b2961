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

from .errors import SimulatorError
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
) -> Generated:
    """Let MLX generate the source of one call without running it.

    Args:
        kernel: What `mx.fast.metal_kernel` returned.
        name: Its name, which diagnostics of the body's lines carry.
        header: As given to MLX.
        body: As given to MLX.
        inputs: Their dtypes and sizes are part of the source.
        call: The other arguments of the call.

    Raises:
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
    return Generated(names[-1], text, _source(name, header, body, text))


def _source(name: str, header: str, body: str, text: str) -> Source:
    return Source(_parts(name, header, body, text), (mlx_include_directory(),), preamble=_PREAMBLE)


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
