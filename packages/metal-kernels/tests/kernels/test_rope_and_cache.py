"""Norm, rotation and cache write in one kernel, against the twin, and the twin against MLX's own rotation."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import kernels, reference

TOLERANCE = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
Q_HEADS, KV_HEADS, BLOCKS, BLOCK_SIZE = 3, 2, 5, 8
SLOTS = [9, -1, 30, 17, 8]


def random_array(rng, *shape, dtype=mx.float32):
    array = mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    mx.eval(array)
    return array


def angles(positions, size):
    frequency = 10000.0 ** (-np.arange(0, size, 2) / size)
    angle = np.array(positions)[:, None] * frequency
    return mx.array(np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32))


def arguments(head_size, rotary, dtype, norm, gated=False):
    rng = np.random.default_rng(0)
    qkv = random_array(rng, len(SLOTS), (Q_HEADS * (1 + gated) + 2 * KV_HEADS) * head_size, dtype=dtype)
    cache = random_array(rng, BLOCKS, 2, BLOCK_SIZE, KV_HEADS, head_size, dtype=dtype)
    norms = {name: random_array(rng, head_size, dtype=dtype) for name in ("q_norm", "k_norm")} if norm else {}
    return [qkv, angles([3, 0, 1000, 17, 40], rotary), cache, mx.array(SLOTS + [-1] * 3, mx.int32)], norms | {
        "eps": 1e-6
    }


@pytest.mark.parametrize(
    ("dtype", "head_size", "rotary", "norm", "traditional"),
    [
        (mx.float32, 80, 32, True, False),
        (mx.float16, 80, 32, True, True),
        (mx.bfloat16, 64, 64, False, True),
        (mx.bfloat16, 128, 128, True, False),
        (mx.bfloat16, 256, 64, False, False),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_agrees_with_its_twin(dtype, head_size, rotary, norm, traditional, gated):
    positional, options = arguments(head_size, rotary, dtype, norm, gated)
    options |= {"traditional": traditional, "gated": gated}
    cache = positional[2]
    copy = mx.array(np.array(cache.astype(mx.float32))).astype(dtype)
    want, wanted = reference.rope_and_cache(positional[0], positional[1], copy, positional[3], **options)
    query, written = kernels.rope_and_cache(*positional, **options)
    mx.eval(query)
    assert written is cache
    tolerance = TOLERANCE[dtype]
    for pair in ((query, want), (cache, wanted)):
        as_numpy = [np.array(array.astype(mx.float32)) for array in pair]
        np.testing.assert_allclose(*as_numpy, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("traditional", [False, True])
def test_twin_rotates_as_mlx_does(traditional):
    (qkv, cos_sin, cache, slots), options = arguments(64, 32, mx.float32, False)
    query, written = reference.rope_and_cache(qkv, cos_sin, cache, slots, traditional=traditional, **options)
    heads = qkv.reshape(len(SLOTS), -1, 64)[:, :, None]
    rope = {"traditional": traditional, "base": 10000.0, "scale": 1.0, "offset": mx.array([3, 0, 1000, 17, 40])}
    want = mx.fast.rope(heads, 32, **rope)[:, :, 0]
    np.testing.assert_allclose(query, want[:, :Q_HEADS], atol=2e-4)
    np.testing.assert_allclose(written[30 // 8, 0, 30 % 8], want[2, Q_HEADS : Q_HEADS + KV_HEADS], atol=2e-4)
    np.testing.assert_array_equal(written[30 // 8, 1, 30 % 8], heads[2, Q_HEADS + KV_HEADS :, 0])


def test_no_rows():
    cache = mx.zeros((2, 2, 8, 1, 64))
    query, written = kernels.rope_and_cache(mx.zeros((0, 4 * 64)), mx.zeros((0, 64)), cache, mx.zeros(8, mx.int32))
    assert query.shape == (0, 2, 64)
    assert written is cache
