import mlx.core as mx
import numpy as np
import pytest

from metal_models.weights.bits import PACKED_BITS, pack, unpack, unpack_padded


def codes(bits: int, rows: int = 5, columns: int = 96) -> mx.array:
    return mx.array(np.random.default_rng(bits).integers(0, 1 << bits, (rows, columns), dtype=np.uint8))


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_words_are_those_that_mlx_reads(bits: int) -> None:
    expected = codes(bits)
    words = pack(expected, bits)
    groups = (5, 3)
    values = mx.dequantize(words, mx.ones(groups), mx.zeros(groups), group_size=32, bits=bits)
    assert mx.array_equal(values, expected.astype(mx.float32))
    assert mx.array_equal(unpack(words, bits), expected)


@pytest.mark.parametrize(("bits", "held"), [(1, 2), (7, 8)])
def test_widths_that_mlx_does_not_have(bits: int, held: int) -> None:
    assert mx.array_equal(pack(codes(bits), bits), pack(codes(bits), held))


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_with_bits_to_spare(bits: int) -> None:
    count = 32 // bits
    expected = np.array(codes(bits, columns=3 * count)).reshape(5, 3, count)
    words = (expected.astype(np.uint64) << (bits * np.arange(count, dtype=np.uint64))).sum(-1).astype(np.uint32)
    found = unpack_padded(mx.array(words.view(np.int32)), bits)
    np.testing.assert_array_equal(np.array(found), expected.reshape(5, -1))


def test_transposed_words() -> None:
    words = pack(codes(4), 4)
    assert mx.array_equal(unpack(words.T.T, 4), codes(4))
    assert mx.array_equal(unpack(mx.contiguous(words.T).T, 4), codes(4))
