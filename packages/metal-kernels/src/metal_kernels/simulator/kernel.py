"""`mx.fast.metal_kernel`, type-checked and executed on the CPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .build import Library, Mode, build
from .capture import MLX_METAL_KERNEL, Generated, generated_source
from .errors import KernelFault, SimulatorError
from .kernels import Parameter
from .launch import Buffer, Schedule, launch
from .memory import Extent, Memory, Scratch, as_numpy, host_view
from .options import Settings, current_settings
from .report import FaultKind, Finding
from .strict_check import METAL_VERSIONS, check

_POISON = b"\xff"
_SMALL = 8  # MLX puts inputs with fewer elements into the constant address space


@dataclass(frozen=True)
class _Output:
    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    scratch: Scratch
    initial: bytes


@dataclass
class _Call:
    """One call: the kernel's buffers in order, and what to restore before each run."""

    buffers: list[Buffer]
    outputs: list[_Output]
    memory: Memory
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    input_dtypes: list[np.dtype]
    tables: list[Scratch] = field(default_factory=list)

    def run(self, library: Library, schedule: Schedule, checked: bool, seed: int) -> list[Finding]:
        self.memory.restore()
        for output in self.outputs:
            output.scratch.fill(output.initial)
        return launch(
            library, self.buffers, self.grid, self.threadgroup, schedule=schedule, checked=checked, seed=seed
        )

    def results(self) -> tuple[list[bytes], list[bytes]]:
        """The outputs' bytes, and those of the inputs' memory."""
        return [o.scratch.content() for o in self.outputs], self.memory.contents()

    def free(self) -> None:
        for scratch in [*self.tables, *(o.scratch for o in self.outputs)]:
            scratch.free()


class SimulatedKernel:
    """What `metal_kernel` returns: called as MLX's own kernels are, evaluates eagerly."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: object | None = None,
    ) -> None:
        self._mlx = MLX_METAL_KERNEL(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            compile_options=compile_options,
        )
        self._name, self._header, self._body = name, header, source
        self._input_names, self._output_names = list(input_names), list(output_names)
        self._ensure_row_contiguous = ensure_row_contiguous
        fast = isinstance(compile_options, Mapping) and compile_options.get("math_mode") == "fast"
        self._defines = ("__FAST_MATH__=1",) * fast
        self._generated: dict[object, Generated] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | int | None = None,
        verbose: bool = False,
        stream: object | None = None,
    ) -> list[mx.array]:
        """Check, run and compare as `settings` say; the arguments are MLX's.

        An input that the kernel changes through ``const_cast`` is changed in the caller's array.

        Raises:
            KernelCompileError: The source is not valid Metal.
            KernelFault: The kernel misbehaved; the message names the lines.
        """
        __tracebackhide__ = True
        if min(threadgroup, default=0) < 1:
            raise SimulatorError(
                f"[{self._name}] expected at least one thread in each dimension of a threadgroup, got {threadgroup}."
            )
        arrays = self._evaluated(inputs)
        call = {
            "output_shapes": [tuple(shape) for shape in output_shapes],
            "output_dtypes": list(output_dtypes),
            "grid": tuple(grid),
            "threadgroup": tuple(threadgroup),
            "template": list(template) if template else None,
        }
        generated = self._source(arrays, call)
        if verbose:
            print(f"Generated source code for `{self._name}`:\n```\n{generated.text}\n```")
        chosen = current_settings()
        check(generated.source, chosen.metal_versions)
        version = max(chosen.metal_versions, default=METAL_VERSIONS[-1])
        modes = [Mode.CHECKED] * chosen.checked + [Mode.FAST] * bool(chosen.schedules)
        libraries = {mode: build(generated.source, generated.kernel, mode, version) for mode in modes}
        with Memory([Extent.of(host_view(a)) for a in arrays]) as memory:
            parameters = next(iter(libraries.values())).kernel.parameters
            bound = self._bind(parameters, arrays, call, memory, init_value, chosen)
            try:
                outputs, mutated = self._run(bound, generated, libraries, chosen)
            finally:
                bound.free()
            memory.write_back(mutated)
        return [_as_array(o, content) for o, content in zip(bound.outputs, outputs, strict=True)]

    def _evaluated(self, inputs: Sequence[Any]) -> list[mx.array]:
        if len(inputs) != len(self._input_names):
            raise SimulatorError(
                f"[{self._name}] expected {len(self._input_names)} inputs, got {len(inputs)}. Pass one for each name."
            )
        arrays = [value if isinstance(value, mx.array) else mx.array(value) for value in inputs]
        if self._ensure_row_contiguous:
            arrays = [mx.contiguous(a) for a in arrays]
        try:
            mx.eval(arrays)
        except ValueError as error:
            raise SimulatorError(
                f"[{self._name}] expected arrays with values, got ones that are being traced. "
                "Call mx.disable_compile() to simulate kernels inside compiled functions."
            ) from error
        return arrays

    def _source(self, arrays: Sequence[mx.array], call: dict[str, Any]) -> Generated:
        inputs = tuple((a.dtype, a.ndim == 0, a.size < _SMALL) for a in arrays)
        key = repr((inputs, call["output_dtypes"], call["template"]))
        if key not in self._generated:
            text = (self._name, self._header, self._body)
            self._generated[key] = generated_source(self._mlx, *text, arrays, call, self._defines)
        return self._generated[key]

    def _bind(
        self,
        parameters: Sequence[Parameter],
        arrays: Sequence[mx.array],
        call: dict[str, Any],
        memory: Memory,
        init_value: float | int | None,
        chosen: Settings,
    ) -> _Call:
        bound = _Call([], [], memory, call["grid"], call["threadgroup"], [host_view(a).dtype for a in arrays])
        named: dict[str, Buffer] = {}
        for name, array in zip(self._input_names, arrays, strict=True):
            view = host_view(array)
            extent = Extent.of(view)
            for suffix, table in _tables(view).items():
                named[name + suffix] = _place_table(bound, name + suffix, table)
            named[name] = Buffer(name, memory.address(extent) + view.ctypes.data - extent.begin, view.nbytes)
            if not view.flags.c_contiguous:
                # The kernel gets the first element's address; its strides reach the rest of the extent.
                named[name] = Buffer(name, memory.address(extent), extent.end - extent.begin)
        for name, shape, dtype in zip(self._output_names, call["output_shapes"], call["output_dtypes"], strict=True):
            output = _make_output(name, shape, dtype, init_value)
            bound.outputs.append(output)
            must_write = init_value is None and not chosen.allow_unwritten
            size = output.scratch.nbytes
            named[name] = Buffer(name, output.scratch.address, size, init_value is not None, must_write)
        used = [p for p in parameters if p.kind == "buffer"]
        bound.buffers = [named[p.name] for p in sorted(used, key=lambda p: p.index)]
        return bound

    def _run(
        self, bound: _Call, generated: Generated, libraries: dict[Mode, Library], chosen: Settings
    ) -> tuple[list[bytes], list[bytes]]:
        """The results of the first schedule, once all runs agree."""
        __tracebackhide__ = True
        runs = [(Mode.CHECKED, Schedule.ORDERED)] * chosen.checked + [(Mode.FAST, s) for s in chosen.schedules]
        kept: list[tuple[list[bytes], list[bytes]]] = []
        for mode, schedule in runs:
            checked = mode is Mode.CHECKED
            self._raise(generated, bound.run(libraries[mode], schedule, checked, chosen.seed))
            results = bound.results()
            if kept:
                self._compare(generated, bound, kept[0], results, chosen.checked and schedule is Schedule.ORDERED)
            kept.append(results)
        return kept[chosen.checked and len(kept) > 1]

    def _compare(
        self,
        generated: Generated,
        bound: _Call,
        first: tuple[list[bytes], list[bytes]],
        second: tuple[list[bytes], list[bytes]],
        same_schedule: bool,
    ) -> None:
        for output, a, b in zip(bound.outputs, first[0], second[0], strict=True):
            if not _agree(a, b, output.dtype):
                self._raise(generated, [_difference(f"output '{output.name}'", same_schedule)])
        if first[1] != second[1]:
            self._raise(generated, [_difference("an input that is written in place", same_schedule)])

    def _raise(self, generated: Generated, findings: Sequence[Finding]) -> None:
        __tracebackhide__ = True
        if not findings:
            return
        lines = []
        texts = {name: text.splitlines() for name, text in generated.source.parts}
        for finding in findings:
            lines.append(finding.message)
            written = texts.get(finding.place.file, []) if finding.place else []
            if finding.place and 0 < finding.place.line <= len(written):
                lines.append(f"    {written[finding.place.line - 1].strip()}")
        raise KernelFault(f"[{self._name}] the kernel misbehaved:\n" + "\n".join(lines), tuple(findings))


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
) -> SimulatedKernel:
    """`mx.fast.metal_kernel` for a machine without Metal; the arguments are MLX's."""
    return SimulatedKernel(
        name,
        input_names,
        output_names,
        source,
        header,
        ensure_row_contiguous,
        atomic_outputs,
        compile_options,
    )


def _difference(what: str, same_schedule: bool) -> Finding:
    if same_schedule:
        message = f"{what} depends on a private variable that is read before it is written"
        return Finding(FaultKind.UNINITIALISED_VARIABLE, None, message)
    return Finding(FaultKind.SCHEDULE_DEPENDENT, None, f"{what} depends on the order in which threads run")


def _tables(view: np.ndarray) -> dict[str, np.ndarray]:
    if view.ndim == 0:
        return {}
    strides = [stride // view.itemsize for stride in view.strides]
    return {
        "_shape": np.array(view.shape, np.int32),
        "_strides": np.array(strides, np.int64),
        "_ndim": np.array([view.ndim], np.int32),
    }


def _place_table(bound: _Call, name: str, table: np.ndarray) -> Buffer:
    scratch = Scratch(table.nbytes)
    scratch.fill(table.tobytes())
    bound.tables.append(scratch)
    return Buffer(name, scratch.address, table.nbytes)


def _make_output(name: str, shape: tuple[int, ...], dtype: mx.Dtype, init_value: float | int | None) -> _Output:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.size
    if init_value is None:
        initial = _POISON * nbytes
    else:
        initial = host_view(mx.array(init_value).astype(dtype)).tobytes() * (nbytes // dtype.size)
    return _Output(name, shape, dtype, Scratch(nbytes), initial)


def _agree(a: bytes, b: bytes, dtype: mx.Dtype) -> bool:
    """Whether two results are the same, but for the rounding of sums that atomics add in another order."""
    if a == b:
        return True
    if not mx.issubdtype(dtype, mx.inexact):
        return False
    values = [np.frombuffer(content, as_numpy(dtype)) for content in (a, b)]
    if dtype == mx.bfloat16:
        values = [(v.astype(np.uint32) << 16).view(np.float32) for v in values]
    wide = [v.astype(np.complex128) for v in values]
    return bool(np.allclose(wide[0], wide[1], rtol=1e-2, atol=1e-3, equal_nan=True))


def _as_array(output: _Output, content: bytes) -> mx.array:
    values = np.frombuffer(content, as_numpy(output.dtype)).reshape(output.shape)
    array = mx.array(values)
    return array.view(mx.bfloat16) if output.dtype == mx.bfloat16 else array
