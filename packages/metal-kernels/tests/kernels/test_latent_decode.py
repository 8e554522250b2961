"""Latent attention around its matmuls: kernels against their twins, and the twins against NumPy."""

import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from metal_kernels import RaggedBatch, kernels, pack_decode, plan_decode, reference

TOLERANCE = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
SLOTS = [9, -1, 30, 17, 8]
BLOCKS, BLOCK_SIZE = 5, 8


def random(rng, *shape, dtype=mx.float32):
    array = mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    mx.eval(array)
    return array


def exact(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def arguments(q_heads, sizes, dtype):
    """Rows as a joined projection leaves them: strided."""
    rng, (nope, latent, rope) = np.random.default_rng(0), sizes
    query = random(rng, 2 * len(SLOTS), q_heads * (nope + rope), dtype=dtype)[::2]
    rows = random(rng, len(SLOTS), 8 + latent + rope, dtype=dtype)[:, 8:]
    angle = rng.uniform(0, 6, (len(SLOTS), rope // 2))
    cos_sin = mx.array(np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32))
    pages = random(rng, BLOCKS, BLOCK_SIZE, latent + rope, dtype=dtype)
    norm = random(rng, latent, dtype=dtype)
    return [query, rows, cos_sin, pages, mx.array(SLOTS + [-1] * 3, mx.int32)], norm


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("q_heads", "sizes", "traditional"), [(3, (32, 64, 8), True), (8, (48, 512, 64), True), (1, (24, 40, 96), False)]
)
def test_rotates_and_writes(q_heads, sizes, traditional, dtype):
    (query, rows, cos_sin, pages, slots), norm = arguments(q_heads, sizes, dtype)
    options = {"q_heads": q_heads, "norm": norm, "eps": 1e-5, "traditional": traditional}
    before = mx.array(np.array(exact(pages))).astype(dtype)
    twin = reference.latent_rope_and_cache(query, rows, cos_sin, before, slots, **options)
    rope, written = kernels.latent_rope_and_cache(query, rows, cos_sin, pages, slots, **options)
    mx.eval(rope)
    assert written is pages
    for found, want in zip((rope, pages), twin, strict=True):
        assert found.dtype == want.dtype == dtype
        np.testing.assert_allclose(exact(found), exact(want), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_twin_does_what_numpy_does():
    q_heads, (nope_size, latent_size, rope_size) = 3, (32, 64, 8)
    (query, rows, cos_sin, pages, slots), norm = arguments(q_heads, (nope_size, latent_size, rope_size), mx.float32)
    before = exact(pages).reshape(-1, latent_size + rope_size)
    rope, written = reference.latent_rope_and_cache(
        query, rows, cos_sin, pages, slots, q_heads=q_heads, norm=norm, eps=1e-5, traditional=True
    )
    heads, angles = exact(query).reshape(len(SLOTS), q_heads, -1), exact(cos_sin)
    turn = (angles[:, : rope_size // 2] + 1j * angles[:, rope_size // 2 :])[:, None]

    def turned(x):
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    np.testing.assert_allclose(exact(rope), turned(heads[..., nope_size:]), atol=1e-5)
    latent, key = exact(rows)[:, :latent_size], turned(exact(rows)[:, None, latent_size:])[:, 0]
    latent = latent / np.sqrt((latent**2).mean(axis=1, keepdims=True) + 1e-5) * exact(norm)
    for slot, *row in zip(SLOTS, latent, key, strict=True):
        if slot >= 0:
            before[slot] = np.concatenate(row)
    np.testing.assert_allclose(exact(written).reshape(before.shape), before, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_attends_as_the_whole_step_does(packed, dtype):
    rng, q_heads, sizes = np.random.default_rng(0), 5, (64, 16)
    seq_lens = np.array([40, 3, 600], np.int32)
    table = np.zeros((3, 80), np.int32)
    table.flat = rng.permutation(240) + 1
    batch = RaggedBatch(np.arange(4, dtype=np.int32), seq_lens, table)
    latent, rope = (random(rng, 3, q_heads, size, dtype=dtype) for size in sizes)
    pages = random(rng, 241, BLOCK_SIZE, sum(sizes), dtype=dtype)
    want = exact(reference.mla_attention(latent, rope, pages, batch, scale=0.1))
    if packed:  # to five requests
        sizes_of_plan, numbers = pack_decode(batch, None, 4, 5, BLOCK_SIZE)
        plan = sizes_of_plan.unpack(mx.array(numbers))
        latent, rope = (mx.pad(x, [(0, 2), (0, 0), (0, 0)]) for x in (latent, rope))
    else:
        plan = plan_decode(batch, np.arange(3, dtype=np.int32), None, 4)
    variant = kernels.mla_decode_kernel("metal", dtype, dtype, *sizes).variant
    found = kernels.mla_decode(latent, rope, pages, plan, variant, scale=0.1)
    for out in (found, reference.latent_decode(latent, rope, pages, plan, scale=0.1)):
        np.testing.assert_allclose(exact(out)[:3], want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_wrong_shapes_are_refused():
    arrays, norm = arguments(3, (32, 64, 8), mx.float32)
    with pytest.raises(metal_kernels.MetalKernelsError, match="queries of 7 heads"):
        metal_kernels.latent_rope_and_cache(*arrays, q_heads=7, norm=norm, eps=1e-5)
    with pytest.raises(metal_kernels.MetalKernelsError, match="a slot for each of 5 rows"):
        metal_kernels.latent_rope_and_cache(*arrays[:4], arrays[4][:4], q_heads=3, norm=norm, eps=1e-5)
