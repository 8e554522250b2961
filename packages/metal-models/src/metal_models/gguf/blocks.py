"""ggml's quantised blocks as MLX's affine form: ``value = scale * code + bias`` per group of 32.

Block layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Each unpacker takes blocks
uint8 [..., blocks, block_bytes] and returns codes uint8 [..., groups, 32] with float32 scales and biases
[..., groups]: the values of the file, not an approximation of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8, UInt32

GROUP_SIZE = 32

Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class AffineFormat:
    """How one ggml type reads as affine codes of ``bits`` bits."""

    bits: int
    unpack: Callable[[np.ndarray], Unpacked]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Read the float16 at byte ``at`` of each block: float32 [..., blocks]."""
    pair = np.ascontiguousarray(blocks[..., at : at + 2])
    return pair.view("<f2")[..., 0].astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles, then high nibbles, of each run of bytes: uint8 [..., 2 * bytes]."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """Bit ``i`` of each little-endian uint32 as the fifth bit of code ``i``: uint8 [..., 32]."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> Unpacked:
    scales = _half(blocks, 0)
    return _nibbles(blocks[..., 2:]), scales, -8 * scales


def _q4_1(blocks: np.ndarray) -> Unpacked:
    return _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> Unpacked:
    scales = _half(blocks, 0)
    return _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), scales, -16 * scales


def _q5_1(blocks: np.ndarray) -> Unpacked:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return codes, _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> Unpacked:
    scales = _half(blocks, 0)
    return blocks[..., 2:] ^ 0x80, scales, -128 * scales


def _sub_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of a K-block's eight groups, from their 6-bit codes: float32 [..., 8 * blocks]."""
    low, middle, high = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([middle & 0x3F, (high >> 4) | ((middle >> 6) << 4)], axis=-1)
    flat = (*blocks.shape[:-2], -1)
    return (
        (_half(blocks, 0)[..., None] * scales).reshape(flat),
        (-_half(blocks, 2)[..., None] * minima).reshape(flat),
    )


def _k_codes(blocks: np.ndarray, at: int) -> np.ndarray:
    """Nibbles of a K-block's last 128 bytes: uint8 [..., blocks, 8, 32]."""
    packed = blocks[..., at:].reshape(*blocks.shape[:-1], 4, 32)
    return np.stack([packed & 0x0F, packed >> 4], axis=-2).reshape(*blocks.shape[:-1], 8, 32)


def _q4_k(blocks: np.ndarray) -> Unpacked:
    codes = _k_codes(blocks, 16).reshape(*blocks.shape[:-2], -1, GROUP_SIZE)
    return codes, *_sub_blocks(blocks)


def _q5_k(blocks: np.ndarray) -> Unpacked:
    bits = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = (_k_codes(blocks, 48) | bits << 4).reshape(*blocks.shape[:-2], -1, GROUP_SIZE)
    return codes, *_sub_blocks(blocks)


AFFINE_FORMATS = {
    "Q4_0": AffineFormat(4, _q4_0),
    "Q4_1": AffineFormat(4, _q4_1),
    "Q5_0": AffineFormat(5, _q5_0),
    "Q5_1": AffineFormat(5, _q5_1),
    "Q8_0": AffineFormat(8, _q8_0),
    "Q4_K": AffineFormat(4, _q4_k),
    "Q5_K": AffineFormat(5, _q5_k),
}


def pack(codes: UInt8[np.ndarray, "rows columns"], bits: int) -> UInt32[np.ndarray, "rows words"]:
    """Pack codes into MLX's words, ``columns * bits / 32`` a row, low bits first."""
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    elif bits != 8:
        spread = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        codes = np.packbits(spread.reshape(len(codes), -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(codes).view("<u4")
