"""Planned decode rows: the kernel, the twin of the plan, and paged attention agree."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import RaggedBatch, decode_plan, kernels, reference, write_and_attend

BLOCK_SIZE = 16


def batch_of(rng, seq_lens):
    needed = [-(-n // BLOCK_SIZE) for n in seq_lens]
    ids = (rng.permutation(sum(needed)) + 1).astype(np.int32)
    table = np.zeros((len(seq_lens), 64), np.int32)
    for request, count in enumerate(needed):
        table[request, :count], ids = ids[:count], ids[count:]
    starts = np.arange(len(seq_lens) + 1, dtype=np.int32)
    return RaggedBatch(starts, np.array(seq_lens, np.int32), table), sum(needed) + 1


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("seq_lens", [[5], [70, 1, 9], [900, 3]], ids=str)
def test_padded_plan(seq_lens, window):
    rng = np.random.default_rng(0)
    batch, blocks = batch_of(rng, seq_lens)
    query = mx.array(rng.normal(size=(4, 4, 64)).astype(np.float32))
    cache = mx.array(rng.normal(size=(blocks, 2, BLOCK_SIZE, 2, 64)).astype(np.float32))
    sizes, packed = decode_plan.pack_decode(batch, window, 16, 4, BLOCK_SIZE)
    assert packed.size == sum(sizes.elements)
    plan = sizes.unpack(mx.array(packed))
    rows = len(seq_lens)
    want = reference.paged_attention(query[:rows], cache, batch, scale=0.125, sliding_window=window)
    variant = kernels.decode_kernel("metal", mx.float32, mx.float32, 64, BLOCK_SIZE, 2).variant
    for out in (
        kernels.paged_decode(query, cache, plan, variant, scale=0.125),
        kernels.paged_decode(query, cache, plan, replace(variant, ahead=1), scale=0.125),
        reference.decode_attention(query, cache, plan, scale=0.125),
    ):
        np.testing.assert_allclose(out[:rows], want, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(out[rows:], mx.zeros((4 - rows, 4, 64)))


def test_sizes_are_shared_by_steps_that_follow_each_other():
    rng = np.random.default_rng(0)
    sizes = {
        decode_plan.pack_decode(batch_of(rng, [n, n + 100])[0], None, 16, 4, BLOCK_SIZE)[0] for n in range(600, 700)
    }
    assert len(sizes) == 1


def test_soft_cap_and_sinks_of_the_twin():
    rng = np.random.default_rng(0)
    batch, blocks = batch_of(rng, [70, 9])
    query, sinks = mx.array(rng.normal(size=(2, 4, 64)) * 2).astype(mx.float32), mx.array(rng.normal(size=4))
    cache = mx.array(rng.normal(size=(blocks, 2, BLOCK_SIZE, 2, 64)).astype(np.float32))
    options = {"scale": 0.125, "soft_cap": 3.0, "sinks": sinks.astype(mx.float32)}
    plan = decode_plan.plan_decode(batch, np.arange(2, dtype=np.int32), None, 16)
    want = reference.paged_attention(query, cache, batch, **options)
    np.testing.assert_allclose(reference.decode_attention(query, cache, plan, **options), want, rtol=2e-5, atol=2e-5)


def rows_of(rng, seq_lens, group, size):
    """Return a padded plan of four rows, projected rows, pages, and the slots of the last keys."""
    batch, blocks = batch_of(rng, seq_lens)
    qkv = mx.array(rng.normal(size=(4, (group + 2) * 2 * size))).astype(mx.float16)
    cache = mx.array(rng.normal(size=(blocks, 2, BLOCK_SIZE, 2, size))).astype(mx.float16)
    slots = np.full(8, -1, np.int32)
    last = np.array(seq_lens) - 1
    slots[: len(last)] = batch.block_table[np.arange(len(last)), last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
    sizes, packed = decode_plan.pack_decode(batch, None, 16, 4, BLOCK_SIZE)
    mx.eval(cache)
    return sizes.unpack(mx.array(packed)), qkv, cache, mx.array(slots)


def layouts(kind, group, size):
    """Return variants to try: plain arithmetic, that with loads ahead, and matrices."""
    plain = kernels.write_decode_kernel("metal", mx.float16, mx.float16, size, BLOCK_SIZE, group).variant
    matrices = kernels.MatrixVariant(group, simdgroups=2, tiles=1, parts=1)
    return {"plain": plain, "ahead": replace(plain, ahead=1), "matrices": matrices}[kind]


KINDS = ["plain", "ahead", "matrices"]
CASES = [([5], 2), ([70, 1, 9], 4), ([900, 16], 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seq_lens", "group", "norm"), [(*case, at != 1) for at, case in enumerate(CASES)], ids=str)
def test_rows_that_are_rotated_and_written_on_the_way(seq_lens, group, norm, kind):
    rng = np.random.default_rng(0)
    size = 64
    plan, qkv, cache, slots = rows_of(rng, seq_lens, group, size)
    angles = rng.uniform(size=(4, size // 2))
    cos_sin = mx.array(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    weights = [mx.array(rng.normal(size=size)).astype(mx.float16) for _ in range(2)]
    norms = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-3} if norm else {}
    query, written = reference.rope_and_cache(qkv, cos_sin, cache + 0, slots, **norms)
    want = reference.decode_attention(query, written, plan, scale=0.125)
    pages = cache + 0
    mx.eval(pages, want, written)
    got = kernels.rope_decode(qkv, cos_sin, pages, slots, plan, layouts(kind, group, size), scale=0.125, **norms)
    mx.eval(got)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(np.array(pages), np.array(written), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seq_lens", "group"), CASES, ids=str)
def test_rows_that_are_written_on_the_way(seq_lens, group, kind):
    """What the row's slot held before is not read, even where it is no number."""
    rng = np.random.default_rng(0)
    size = 128 if kind == "matrices" else 64
    plan, qkv, cache, slots = rows_of(rng, seq_lens, group, size)
    rows, wanted = qkv.reshape(4, -1, size), slots[: len(seq_lens)]
    query, key, value = rows[:, : 2 * group], rows[:, 2 * group : -2], rows[:, -2:]
    pages = cache + 0
    pages[wanted // BLOCK_SIZE, :, wanted % BLOCK_SIZE] = mx.nan
    written, _ = reference.reshape_and_cache(key, value, cache + 0, slots[:4])
    options = {"scale": 0.1, "soft_cap": 5.0, "sinks": mx.array(rng.normal(size=2 * group))}
    want = reference.decode_attention(query, written, plan, **options)
    mx.eval(pages, want, written)
    got = kernels.write_decode(query, key, value, pages, slots, plan, layouts(kind, group, size), **options)
    mx.eval(got)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=5e-3, atol=5e-3)
    np.testing.assert_array_equal(np.array(pages), np.array(written))


def test_write_and_attend_is_both():
    rng = np.random.default_rng(0)
    plan, qkv, cache, slots = rows_of(rng, [70, 9, 3, 1], 2, 64)
    rows = qkv.reshape(4, 8, 64)
    written, _ = reference.reshape_and_cache(rows[:, 4:6], rows[:, 6:], cache + 0, slots[:4])
    want = reference.decode_attention(rows[:, :4], written, plan, scale=0.125)
    mx.eval(written, want)
    got, pages = write_and_attend(rows[:, :4], rows[:, 4:6], rows[:, 6:], cache, slots, plan, scale=0.125)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=5e-3, atol=5e-3)
    np.testing.assert_array_equal(np.array(pages), np.array(written))
