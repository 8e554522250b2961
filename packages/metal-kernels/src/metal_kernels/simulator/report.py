"""What went wrong in a launch, in words that name the line."""

import ctypes
from dataclasses import dataclass
from enum import IntEnum

from .places import Place

_MAX_FAULTS = 16


class FaultKind(IntEnum):
    """Kinds of misbehaviour: ``Kind`` of runtime/report.h, and two that comparing runs finds."""

    OUT_OF_BOUNDS_READ = 0
    OUT_OF_BOUNDS_WRITE = 1
    MISALIGNED = 2
    UNINITIALISED_READ = 3
    RACE_IN_THREADGROUP = 4
    RACE_BETWEEN_THREADGROUPS = 5
    DIVERGENT_BARRIER = 6
    THREADGROUP_MEMORY = 7
    TOO_MANY_THREADS = 8
    NEVER_WRITTEN = 9
    ARRAY_INDEX = 10
    DIVISION_BY_ZERO = 11
    ENDLESS = 12
    DEADLOCK = 13
    MISSING_THREADS_AT_BARRIER = 14
    CRASH = 15
    SCHEDULE_DEPENDENT = 16
    UNINITIALISED_VARIABLE = 17


@dataclass(frozen=True)
class Finding:
    """One fault: its kind, the line of the kernel (None if it has none) and the whole sentence."""

    kind: FaultKind
    place: Place | None
    message: str


class RawFault(ctypes.Structure):
    """``Fault`` of runtime/report.h."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("pc", ctypes.c_uint64),
        ("other_pc", ctypes.c_uint64),
        ("space", ctypes.c_uint32),
        ("buffer", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("thread", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
        ("other_thread", ctypes.c_uint32),
        ("other_group", ctypes.c_uint32),
        ("other_line", ctypes.c_uint32),
        ("writes", ctypes.c_uint32),
    )


class RawReport(ctypes.Structure):
    """``Report`` of runtime/report.h."""

    _fields_ = (
        ("switches", ctypes.c_uint64),
        ("collectives", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("partial_collectives", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("accesses", ctypes.c_uint64),
        ("fault_count", ctypes.c_uint32),
        ("stopped", ctypes.c_uint32),
        ("faults", RawFault * _MAX_FAULTS),
    )


_ACCESSES = {
    0: "read after unordered read",
    1: "write after unordered read",
    2: "read after unordered write",
    3: "two unordered writes",
}


_CRASHES = {
    False: "access to memory that does not exist",
    True: "more private memory than a thread has: large private arrays, or recursion",
}


_DIVISIONS = {False: "by zero", True: "that overflows: of the smallest number by -1"}


def describe(fault: RawFault, names: list[str]) -> str:
    """One sentence for a fault, without its place; ``names`` are the buffers'."""
    kind = FaultKind(fault.kind)
    name = names[fault.buffer] if fault.buffer < len(names) else "?"
    memory = {1: f"'{name}'", 2: "threadgroup memory"}.get(fault.space, "memory of no buffer")
    what = f"{fault.size} bytes at byte {ctypes.c_int64(fault.offset).value} of {memory}"
    who = f"thread {fault.thread} of threadgroup {fault.group}"
    other = f"thread {fault.other_thread} of threadgroup {fault.other_group}"
    race = f"{_ACCESSES[fault.writes]}: {what}, {who} and {other}"
    return {
        FaultKind.OUT_OF_BOUNDS_READ: f"out-of-bounds read: {what}, {who}",
        FaultKind.OUT_OF_BOUNDS_WRITE: f"out-of-bounds write: {what}, {who}",
        FaultKind.MISALIGNED: f"misaligned access: {what}, {who}",
        FaultKind.UNINITIALISED_READ: f"read of uninitialised memory: {what}, {who}",
        FaultKind.RACE_IN_THREADGROUP: f"data race inside a threadgroup: {race}",
        FaultKind.RACE_BETWEEN_THREADGROUPS: f"data race between threadgroups: {race}",
        FaultKind.DIVERGENT_BARRIER: f"divergent threadgroup_barrier: others of threadgroup {fault.group} wait",
        FaultKind.THREADGROUP_MEMORY: f"too much threadgroup memory: {fault.offset} of {fault.size} bytes",
        FaultKind.TOO_MANY_THREADS: f"too many threads per threadgroup: {fault.offset} of {fault.size}",
        FaultKind.NEVER_WRITTEN: f"output '{name}' never written: {fault.size} bytes from byte {fault.offset}",
        FaultKind.ARRAY_INDEX: f"array index {ctypes.c_int64(fault.offset).value} is out of bounds, {who}",
        FaultKind.DIVISION_BY_ZERO: f"integer division {_DIVISIONS[fault.offset != 0]}, {who}",
        FaultKind.ENDLESS: f"the kernel does not end: {who}",
        FaultKind.DEADLOCK: f"deadlock in threadgroup {fault.group}",
        FaultKind.CRASH: f"{_CRASHES[bool(fault.size)]}, {who}",
        FaultKind.MISSING_THREADS_AT_BARRIER: (
            f"divergent threadgroup_barrier: {fault.offset} of {fault.size} threads reach it, others returned"
        ),
    }[kind]
