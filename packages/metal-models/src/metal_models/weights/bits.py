"""Codes of 2 to 8 bits in 32-bit words, and as bytes."""

import mlx.core as mx
from jaxtyping import UInt8, UInt32

PACKED_BITS = (2, 3, 4, 5, 6, 8)
"""Widths that MLX's affine form has."""


def pack(codes: UInt8[mx.array, "rows columns"], bits: int) -> UInt32[mx.array, "rows words"]:
    """Pack codes into MLX's words: a stream of bits, low ones first, without gaps.

    Args:
        codes: A multiple of 32 a row.
        bits: Their width. One that MLX does not have becomes the next that it has.
    """
    bits = next(width for width in PACKED_BITS if width >= bits)
    if bits == 8:
        return mx.contiguous(codes).view(mx.uint32)
    if bits in (2, 4):
        packed = _joined(codes, bits)
    else:
        spread = (codes[..., None] >> mx.arange(bits, dtype=mx.uint8)) & 1
        packed = _joined(spread.reshape(codes.shape[0], -1), 1)
    return packed.view(mx.uint32)


def unpack(words: mx.array, bits: int) -> UInt8[mx.array, "rows columns"]:
    """Return the codes of each row of 32-bit words, a stream of bits without gaps, low ones first.

    A row has a multiple of 32 bits and of ``bits``.
    """
    stream = mx.contiguous(words).view(mx.uint8)
    if bits in (2, 4, 8):
        return stream if bits == 8 else _split(stream, bits)
    single = _split(stream, 1).reshape(words.shape[0], -1, bits)
    return (single << mx.arange(bits, dtype=mx.uint8)).sum(axis=-1).astype(mx.uint8)


def unpack_padded(words: mx.array, bits: int) -> UInt8[mx.array, "rows columns"]:
    """Return the codes of words that hold ``32 // bits`` each, low ones first, the rest of their bits being empty."""
    if 32 % bits == 0:
        return unpack(words, bits)
    single = _split(mx.contiguous(words).view(mx.uint8), 1).reshape(*words.shape, 32)
    used = single[..., : 32 // bits * bits].reshape(words.shape[0], -1, bits)
    return (used << mx.arange(bits, dtype=mx.uint8)).sum(axis=-1).astype(mx.uint8)


def _split(stream: UInt8[mx.array, "rows bytes"], bits: int) -> UInt8[mx.array, "rows codes"]:
    """Return the codes of bytes that hold a whole number of them."""
    shifts = mx.arange(0, 8, bits, dtype=mx.uint8)
    return ((stream[..., None] >> shifts) & ((1 << bits) - 1)).reshape(stream.shape[0], -1)


def _joined(codes: UInt8[mx.array, "rows codes"], bits: int) -> UInt8[mx.array, "rows bytes"]:
    """Join codes to bytes that hold a whole number of them."""
    count = 8 // bits
    joined = codes[..., ::count]
    for place in range(1, count):
        joined = joined | (codes[..., place::count] << (place * bits))
    return joined
