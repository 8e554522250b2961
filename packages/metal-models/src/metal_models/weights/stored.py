"""Quantised weights as checkpoints store them: in MLX's packed form where that loses nothing, or as floats."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32, UInt8

from metal_models.weights.bits import pack

GROUP_SIZES = (128, 64, 32)
"""Columns that MLX's affine form can give one scale."""

_MXFP8_GROUP = 32
_FP4_MODES = {"mxfp4": 32, "nvfp4": 16}
_LEAST_EXPONENT, _LARGEST_EXPONENT = -127, 127  # of an E8M0 scale


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as MLX's quantised layers hold it; see ``mx.quantize``.

    Attributes:
        weight: uint32 words.
        scales: In the dtype of activations (affine) or uint8 (the other modes).
        biases: Of the affine mode only.
        factor: One float32 number that the nvfp4 mode's values are multiplied with.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None
    factor: mx.array | None = None


@runtime_checkable
class StoredWeight(Protocol):
    """A quantised weight; nothing of it is read or computed before the result is evaluated."""

    def packed(self, dtype: mx.Dtype) -> Packed | None:
        """Return it for MLX's quantised layers, scales in ``dtype``; None where no mode of MLX has its values."""

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """Return its values, computed in float32 and rounded once."""


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """``(code - zero) * scale``.

    Attributes:
        codes: One byte each, from 0.
        bits: How many of those are used.
        scales: Per row and group of columns.
        zeros: Likewise.
        column_groups: The group of each column; None for groups of equally many neighbours.
    """

    codes: UInt8[mx.array, "rows columns"]
    bits: int
    scales: Float[mx.array, "rows groups"]
    zeros: Float[mx.array, "rows groups"]
    column_groups: Int32[mx.array, " columns"] | None = None

    def packed(self, dtype: mx.Dtype) -> Packed | None:
        """Pack the codes; a scale of many columns is repeated for as many groups as MLX needs."""
        width = self._group_width()
        group_size = next((size for size in GROUP_SIZES if width is not None and width % size == 0), None)
        if width is None or group_size is None:
            return None
        repeats = width // group_size
        scales, biases = (
            mx.repeat(values, repeats, axis=-1) if repeats > 1 else values
            for values in (self.scales.astype(dtype), self._biases().astype(dtype))
        )
        return Packed(pack(self.codes, self.bits), mx.contiguous(scales), mx.contiguous(biases))

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """Return ``[rows, columns]``."""
        scales, biases = self._by_column(self.scales.astype(mx.float32)), self._by_column(self._biases())
        return (self.codes.astype(mx.float32) * scales + biases).astype(dtype)

    def _biases(self) -> Float[mx.array, "rows groups"]:
        return -self.zeros.astype(mx.float32) * self.scales.astype(mx.float32)

    def _group_width(self) -> int | None:
        """Columns of a group, if all have as many, one after the other."""
        columns, groups = self.codes.shape[-1], self.scales.shape[-1]
        return columns // groups if self.column_groups is None and columns % groups == 0 else None

    def _by_column(self, values: Float[mx.array, "rows groups"]) -> Float[mx.array, "rows columns"]:
        columns, groups = self.codes.shape[-1], values.shape[-1]
        if self.column_groups is not None:
            return values[:, self.column_groups]
        return mx.repeat(values, -(-columns // groups), axis=-1)[:, :columns]


@dataclass(frozen=True, eq=False)
class Float8Weight:
    """E4M3 numbers, times a scale per block of rows and columns.

    Attributes:
        codes: The numbers, bit by bit.
        scales: One per block.
        block: Rows and columns of a block; the last ones may be cut off by the weight's edge.
    """

    codes: UInt8[mx.array, "*experts rows columns"]
    scales: Float[mx.array, "*experts row_blocks column_blocks"]
    block: tuple[int, int]

    def packed(self, dtype: mx.Dtype) -> Packed | None:
        """Take mxfp8, whose scales are powers of two; the scales are read to see whether they are."""
        rows, columns = self.codes.shape[-2:]
        aligned = self.block[1] % _MXFP8_GROUP == 0 or self.block[1] >= columns
        if self.codes.ndim != 2 or columns % _MXFP8_GROUP or not aligned:
            return None
        exponents = _exponents(self.scales)
        if exponents is None:
            return None
        groups = mx.repeat(mx.array(exponents), self.block[0], axis=0)[:rows]
        groups = mx.repeat(groups, -(-min(self.block[1], columns) // _MXFP8_GROUP), axis=1)
        return Packed(pack(self.codes, 8), mx.contiguous(groups[:, : columns // _MXFP8_GROUP]))

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """Return ``[*experts, rows, columns]``."""
        rows, columns = self.codes.shape[-2:]
        scales = mx.repeat(self.scales.astype(mx.float32), min(self.block[0], rows), axis=-2)[..., :rows, :]
        scales = mx.repeat(scales, min(self.block[1], columns), axis=-1)[..., :columns]
        return (mx.from_fp8(self.codes, mx.float32) * scales).astype(dtype)


@dataclass(frozen=True, eq=False)
class Float4Weight:
    """E2M1 numbers, two a byte and low ones first, times a scale per group of columns, times a factor.

    Attributes:
        codes: The numbers.
        scales: E8M0 for groups of 32 (``mxfp4``) or E4M3 for groups of 16 (``nvfp4``), bit by bit.
        mode: Which of the two.
        factor: One number for the whole weight.
    """

    codes: UInt8[mx.array, "rows bytes"]
    scales: UInt8[mx.array, "rows groups"]
    mode: str
    factor: mx.array | None = None

    def packed(self, dtype: mx.Dtype) -> Packed | None:
        """Take the words as they are. Without their factor, products can be too large for float16."""
        columns = 2 * self.codes.shape[-1]
        fits = columns == self.scales.shape[-1] * _FP4_MODES[self.mode] and columns % 32 == 0
        if not fits or (self.factor is not None and dtype == mx.float16):
            return None
        return Packed(mx.contiguous(self.codes).view(mx.uint32), self.scales, factor=self.factor)

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """Return ``[rows, columns]``."""
        words = mx.contiguous(self.codes).view(mx.uint32)
        values = mx.dequantize(words, self.scales, mode=self.mode, dtype=mx.float32)
        return (values if self.factor is None else values * self.factor).astype(dtype)


def _exponents(
    scales: Float[mx.array, "row_blocks column_blocks"],
) -> UInt8[np.ndarray, "row_blocks column_blocks"] | None:
    """Return scales as E8M0, unless one is no power of two."""
    mantissas, raised = np.frexp(np.array(scales.astype(mx.float32)))
    exponents: np.ndarray = raised - 1
    if not (mantissas == 0.5).all() or exponents.min() < _LEAST_EXPONENT or exponents.max() > _LARGEST_EXPONENT:
        return None
    stored: np.ndarray = (exponents - _LEAST_EXPONENT).astype(np.uint8)
    return stored
