"""A kernel whose one body is launched through MLX on Metal or on CUDA."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_kernels.device import target

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class PortableKernel:
    """A kernel, compiled by MLX at its first call for each combination of dtypes and template values.

    Inputs are passed as they lie in memory: a kernel that does not read an input's strides needs it contiguous, or
    ``contiguous``, which copies other inputs and therefore suits only kernels that change none.

    Args:
        name: Of the kernel; bodies with other ``defines`` need another name.
        inputs: Names of the inputs in the body.
        outputs: Names of the outputs in the body.
        body: File of the body in this folder.
        defines: Preprocessor lines that the body depends on.
        contiguous: Whether MLX copies inputs that are not contiguous.
        headers: Functions that the body uses, beside the prelude: files ``name.h``, after ``name_metal.h`` or
            ``name_cuda.h``, where they exist.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    defines: str = ""
    contiguous: bool = False
    headers: tuple[str, ...] = ("words",)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
        *,
        threadgroups: tuple[int, int],
        threads: int,
        template: dict[str, int | mx.Dtype],
    ) -> list[mx.array]:
        """Launch whole threadgroups of ``threads`` threads; ``outputs`` are shapes and dtypes."""
        compiled = self._cuda if target() == "cuda" else self._metal
        launched: list[mx.array] = compiled(
            inputs=list(inputs),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=(threadgroups[0] * threads, threadgroups[1], 1),
            threadgroup=(threads, 1, 1),
            template=list(template.items()),
        )
        return launched

    @cached_property
    def _metal(self) -> Any:
        return mx.fast.metal_kernel(**self._parts("metal"))

    @cached_property
    def _cuda(self) -> Any:
        return mx.fast.cuda_kernel(**self._parts("cuda"))

    def _parts(self, language: str) -> dict[str, Any]:
        names = [f"{name}{end}.h" for name in ("prelude", *self.headers) for end in (f"_{language}", "")]
        files = [_FOLDER / name for name in names if (_FOLDER / name).exists()]
        told = _included if language == "cuda" else partial(_text, defines=self.defines)
        return {
            "name": self.name,
            "input_names": list(self.inputs),
            "output_names": list(self.outputs),
            "header": self.defines + "".join(told(file) for file in files),
            "source": told(_FOLDER / self.body),
            "ensure_row_contiguous": self.contiguous,
        }


def _text(file: Path, defines: str) -> str:
    """Return what a file says, line by line, without comments, indentation and branches that ``defines`` leave out.

    MLX hashes it at every launch.
    """
    lines = _taken(file.read_text().splitlines(), dict(re.findall(r"#define (\w+) (\d+)\n", defines)))
    return "".join(re.sub(r"\s*//.*| +(?= )|^ +", "", line) + "\n" for line in lines)


def _taken(lines: Iterable[str], values: dict[str, str]) -> Iterator[str]:
    """Yield the lines of branches that ``values`` take, and whole those that ask for something else."""
    branches: list[bool | None] = []  # whether each that is open is taken; None if the compiler decides
    for line in lines:
        asked = re.fullmatch(r"#if (\w+)(?: (==|!=) (\d+))?", line)
        if line.startswith("#if"):
            known = asked is not None and asked[1] in values
            branches.append(_holds(values[asked[1]], asked[2] or "!=", asked[3] or "0") if asked and known else None)
            keep = branches[-1] is None
        elif line in ("#else", "#endif"):
            last = branches.pop()
            keep = last is None
            if line == "#else":
                branches.append(None if last is None else not last)
        else:
            keep = True
        if keep and False not in branches:
            yield line


def _holds(value: str, compared: str, other: str) -> bool:
    return (value == other) == (compared == "==")


def _included(file: Path) -> str:
    """Return a line that makes CUDA's compiler read a file, and names the parameters that MLX gives the kernel for it.

    MLX hashes a kernel's text at every launch, which takes longer than all the rest of some launches.
    """
    wanted = sorted(set(re.findall(r"\w+_(?:shape|strides|ndim)\b", file.read_text())))
    return f'#include "{file}"  // {" ".join(wanted)}\n'


@cache
def constants(*values: float) -> mx.array:
    """Return ``values`` as a float32 array of eight elements, zero-padded."""
    return mx.array(np.pad(np.array(values, np.float32), (0, 8 - len(values))))


def order_input(order_token: mx.array | None) -> mx.array:
    """Return what a reader takes as its order token: a constant if there is nothing to wait for."""
    return constants(0.0) if order_token is None or order_token.size == 0 else order_token
