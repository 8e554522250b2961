"""A GGUF file's header: its metadata and the place, shape and type of each tensor.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing of the tensors' data is
read until it is asked for.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metal_models.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class TensorType:
    """One of ggml's number formats: ``block_bytes`` hold ``block_values`` consecutive values of a row."""

    name: str
    block_values: int
    block_bytes: int


TENSOR_TYPES = {
    number: TensorType(name, values, size)
    for number, name, values, size in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
    )
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``shape`` is row-major (rows first), ``offset`` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last axis)."""
        return self.shape[-1] // self.type.block_values * self.type.block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in the file."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """The header of one GGUF file.

    Attributes:
        path: The file.
        metadata: Key to value; arrays are lists of strings or NumPy arrays.
        tensors: Name to entry, in file order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> "GGUFFile":
        """Read the header and check that every tensor lies inside the file.

        Raises:
            CheckpointError: Not a GGUF file, an unknown version or tensor type, or a truncated file.
        """
        size = path.stat().st_size if path.is_file() else 0
        if size < 24:
            raise CheckpointError(f"[gguf] expected a GGUF file, got {size} bytes in {path}.")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return cls(path, *_Header(data, path).read())
            except (struct.error, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"[gguf] expected a complete header, got a truncated or damaged one in {path} ({error}). "
                    "Download the file again."
                ) from error

    @property
    def architecture(self) -> str:
        """The file's own word for its architecture, such as ``llama``."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the architecture's own metadata value, such as ``attention.head_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def rows(self, name: str) -> np.ndarray:
        """Map a tensor's bytes: uint8 [rows, row_bytes], read from the disk when touched."""
        entry = self.tensors[name]
        shape = (math.prod(entry.shape[:-1]), entry.row_bytes)
        return np.memmap(self.path, np.uint8, "r", entry.offset, shape)


class _Header:
    """A cursor over the mapped file; every read past its end raises ``struct.error``."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        magic, version = self._data[:4], int.from_bytes(self._data[4:8], "little")
        if magic != _MAGIC or version not in _VERSIONS:
            raise CheckpointError(
                f"[gguf] expected a little-endian GGUF file of version 2 or 3, got magic {magic!r}, "
                f"version {version} in {self._path}. Convert the model again with a current llama.cpp."
            )
        self._at = 8
        tensor_count, key_count = self._number("<u8"), self._number("<u8")
        metadata = {}
        for _ in range(key_count):
            key = self._string()
            metadata[key] = self._value(self._number("<u4"))
        places = [self._place() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        tensors = {entry.name: entry for entry in (self._entry(place, start) for place in places)}
        return metadata, tensors

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise struct.error(f"{size} bytes wanted at {self._at} of {len(self._data)}")
        self._at += size
        return self._data[self._at - size : self._at]

    def _numbers(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self._take(count * np.dtype(dtype).itemsize), dtype)

    def _number(self, dtype: str) -> Any:
        return self._numbers(dtype, 1)[0].item()

    def _string(self) -> str:
        return self._take(int.from_bytes(self._take(8), "little")).decode("utf-8")

    def _strings(self, count: int) -> list[str]:
        """Read many strings in one loop: a vocabulary and its merges have hundreds of thousands."""
        data, at, strings = self._data, self._at, []
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", data, at)
            at += 8 + size
            if at > len(data):
                raise struct.error(f"a string up to {at} of {len(data)}")
            strings.append(data[at - size : at].decode("utf-8"))
        self._at = at
        return strings

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._scalar(kind))
        item, count = self._number("<u4"), self._number("<u8")
        if item == _STRING:
            return self._strings(count)
        if item == _ARRAY:
            return [self._value(item) for _ in range(count)]
        return self._numbers(self._scalar(item), count)

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise struct.error(f"unknown metadata type {kind}")
        return _SCALARS[kind]

    def _place(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        shape = tuple(int(size) for size in reversed(self._numbers("<u8", self._number("<u4"))))
        return name, shape, self._number("<u4"), self._number("<u8")

    def _entry(self, place: tuple[str, tuple[int, ...], int, int], start: int) -> TensorEntry:
        name, shape, number, offset = place
        if number not in TENSOR_TYPES:
            raise CheckpointError(f"[gguf] expected a tensor type we know, got number {number} for {name!r}.")
        entry = TensorEntry(name, shape, TENSOR_TYPES[number], start + offset)
        if not shape or shape[-1] % entry.type.block_values:
            raise CheckpointError(
                f"[gguf] expected rows of a multiple of {entry.type.block_values} values for {name!r} "
                f"({entry.type.name}), got shape {shape} in {self._path}."
            )
        if entry.offset + entry.nbytes > len(self._data):
            raise CheckpointError(
                f"[gguf] expected {entry.nbytes} bytes for {name!r} at {entry.offset}, got a file of "
                f"{len(self._data)} bytes: {self._path} is truncated. Download the file again."
            )
        return entry
