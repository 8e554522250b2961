"""One launch of a compiled kernel over a set of buffers."""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from .build import Library, runtime
from .kernels import MAX_BUFFERS
from .report import FaultKind, Finding, RawReport, describe

_UNTOUCHED_BYTE = 0xFF  # of threadgroup memory: not a number in every floating-point type

_one_at_a_time = threading.Lock()  # the executor is a single machine


class Schedule(IntEnum):
    """The order in which threadgroups, and the threads of each, run."""

    ORDERED = 0
    REVERSED = 1
    SHUFFLED = 2


@dataclass(frozen=True)
class Buffer:
    """Memory bound to a kernel; ``initialised`` memory may be read, ``must_write`` memory must be filled."""

    name: str
    address: int
    nbytes: int
    initialised: bool = True
    must_write: bool = False


class _RawBuffer(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("initialised", ctypes.c_uint32),
        ("must_write", ctypes.c_uint32),
    )


class _RawLaunch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_RawBuffer)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
        ("max_threads", ctypes.c_uint32),
        ("poison", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("library_begin", ctypes.c_uint64),
        ("library_end", ctypes.c_uint64),
    )


def launch(
    library: Library,
    buffers: Sequence[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    schedule: Schedule = Schedule.ORDERED,
    checked: bool = False,
    seed: int = 1,
) -> list[Finding]:
    """Run the kernel on ``buffers``, in the order of its buffer indices, and return what it did wrong.

    Args:
        library: Compiled in the mode that ``checked`` says.
        buffers: Changed in place.
        grid: Threads, not threadgroups, in each dimension.
        threadgroup: Threads of a threadgroup; clipped to the grid.
        schedule: Order of execution.
        checked: Whether ``library`` reports its memory accesses.
        seed: Of the shuffled schedule.
    """
    assert len(buffers) <= MAX_BUFFERS
    raw = (_RawBuffer * max(1, len(buffers)))()
    for k, b in enumerate(buffers):
        raw[k] = _RawBuffer(b.address, b.nbytes, int(b.initialised), int(b.must_write))
    begin, end = library.address_range
    request = _RawLaunch(
        entry=library.entry,
        buffers=raw,
        buffer_count=len(buffers),
        grid=(ctypes.c_uint32 * 3)(*grid),
        threadgroup=(ctypes.c_uint32 * 3)(*threadgroup),
        order=int(schedule),
        checked=int(checked),
        max_threads=library.kernel.max_threads,
        poison=_UNTOUCHED_BYTE,
        seed=seed,
        library_begin=begin,
        library_end=end,
    )
    report = RawReport()
    with _one_at_a_time:
        runtime().msl_launch(ctypes.byref(request), ctypes.byref(report))
    return _findings(report, library, [b.name for b in buffers])


def _findings(report: RawReport, library: Library, names: list[str]) -> list[Finding]:
    found = []
    for fault in report.faults[: report.fault_count]:
        place = library.place(fault.line, fault.pc)
        sentence = describe(fault, names)
        other = library.place(fault.other_line, fault.other_pc)
        if other:
            sentence += f" at {other}"
        found.append(Finding(FaultKind(fault.kind), place, f"{place}: {sentence}" if place else sentence))
    return found
