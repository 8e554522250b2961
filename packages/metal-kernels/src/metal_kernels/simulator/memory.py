"""Private copies of a call's arrays, for kernels to read and write."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .build import runtime

_GAP_BYTES = 1 << 26  # unmapped, on both sides of every copy


def host_view(array: mx.array) -> np.ndarray:
    """The memory of an evaluated array as NumPy sees it; bfloat16 shows as uint16."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def as_numpy(dtype: mx.Dtype) -> np.dtype:
    """The NumPy dtype that stores ``dtype``; uint16 for bfloat16."""
    return host_view(mx.zeros((1,), dtype)).dtype


@dataclass(frozen=True)
class Extent:
    """The bytes ``[begin, end)`` that an array's elements span."""

    begin: int
    end: int

    @classmethod
    def of(cls, view: np.ndarray) -> "Extent":
        """The extent of a view with any strides."""
        begin = end = view.ctypes.data
        if view.size == 0:
            return cls(begin, end)
        for size, stride in zip(view.shape, view.strides, strict=True):
            span = (size - 1) * stride
            begin, end = (begin, end + span) if span > 0 else (begin + span, end)
        return cls(begin, end + view.itemsize)


class Memory:
    """Copies of byte ranges; ranges that share bytes share their copy.

    Invariants: a kernel never touches the caller's memory; `write_back` is the only way there.
    """

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._groups = _merged(extents)
        self._copies = {group: _map(group.end - group.begin) for group in self._groups}
        self.restore()

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        for group, address in self._copies.items():
            runtime().msl_unmap(address, group.end - group.begin, _GAP_BYTES)
        self._copies = {}

    def address(self, extent: Extent) -> int:
        """Where the copy of ``extent`` is."""
        group = next(g for g in self._groups if g.begin <= extent.begin and extent.end <= g.end)
        return self._copies[group] + extent.begin - group.begin

    def restore(self) -> None:
        """Copy the caller's bytes again."""
        for group, address in self._copies.items():
            ctypes.memmove(address, group.begin, group.end - group.begin)

    def contents(self) -> list[bytes]:
        """What the copies hold, in a fixed order."""
        return [ctypes.string_at(a, g.end - g.begin) for g, a in self._copies.items()]

    def write_back(self, contents: Sequence[bytes]) -> None:
        """Make kept contents the caller's, where they differ."""
        for group, kept in zip(self._groups, contents, strict=True):
            if kept != ctypes.string_at(group.begin, group.end - group.begin):
                ctypes.memmove(group.begin, kept, len(kept))


class Scratch:
    """Memory for one output or a small table."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = _map(nbytes)

    def free(self) -> None:
        """Unmap it."""
        runtime().msl_unmap(self.address, self.nbytes, _GAP_BYTES)

    def fill(self, content: bytes) -> None:
        """Set all bytes."""
        ctypes.memmove(self.address, content, self.nbytes)

    def content(self) -> bytes:
        """A copy of all bytes."""
        return ctypes.string_at(self.address, self.nbytes)


def _map(nbytes: int) -> int:
    address: int = runtime().msl_map(nbytes, _GAP_BYTES)
    if not address:
        raise MemoryError(f"[simulator] expected {nbytes} bytes of memory, got none. Use smaller arrays.")
    return address


def _merged(extents: Sequence[Extent]) -> list[Extent]:
    groups: list[Extent] = []
    for extent in sorted(set(extents), key=lambda e: (e.begin, -e.end)):
        if groups and extent.begin < groups[-1].end:
            groups[-1] = Extent(groups[-1].begin, max(groups[-1].end, extent.end))
        elif not groups or extent != groups[-1]:
            groups.append(extent)
    return groups
