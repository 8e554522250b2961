"""Latent rows in a pool: written to their slots, attended over block tables."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kv import (
    AttentionMetadata,
    CacheGroup,
    CacheLayout,
    FullAttentionSpec,
    KVCachePool,
    LatentSpec,
    MetalKVError,
)

LATENT = LatentSpec(4, 16, 8, dtype=mx.float32)


def make_pool(**specs):
    groups = [CacheGroup((name,), spec) for name, spec in specs.items()]
    return KVCachePool(CacheLayout.from_groups(groups, 8))


def rows(count, seed):
    keys = mx.random.split(mx.random.key(seed), 4)
    shapes = ((count, 16), (count, 8), (count, 3, 16), (count, 3, 8))
    return [mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)]


@pytest.mark.parametrize("use_kernel", [True, False])
@pytest.mark.parametrize("pieces", [(7,), (3, 4), (1, 1, 5), (6, 1)])
def test_rows_written_in_pieces_are_attended_as_a_whole(pieces, use_kernel):
    layer = make_pool(latent=LATENT).layer("latent")
    latent, rope, query_latent, query_rope = rows(7, 0)
    outputs, start = [], 0
    for count in pieces:
        end = start + count
        metadata = AttentionMetadata.build([0, count], [end], np.array([[5, 2]], np.int32), 4)
        token = layer.write_latent(latent[start:end], rope[start:end], metadata)
        outputs.append(
            layer.attend_latent(
                query_latent[start:end],
                query_rope[start:end],
                metadata,
                scale=0.2,
                order_token=token,
                use_kernel=use_kernel,
            )
        )
        mx.eval(outputs)
        start = end
    keys, queries = mx.concatenate([latent, rope], -1), mx.concatenate([query_latent, query_rope], -1)
    scores = 0.2 * mx.einsum("qhd,kd->hqk", queries, keys)
    scores = mx.where(mx.arange(7) <= mx.arange(7)[:, None], scores, -mx.inf)
    expected = mx.einsum("hqk,kd->qhd", mx.softmax(scores, axis=-1), latent)
    np.testing.assert_allclose(np.array(mx.concatenate(outputs)), np.array(expected), rtol=1e-5, atol=1e-5)


def test_other_attention_reads_pages():
    layer = make_pool(latent=LATENT).layer("latent")
    latent, rope, *_ = rows(6, 1)
    metadata = AttentionMetadata.build([0, 6], [6], np.array([[3, 1]], np.int32), 4)
    token = layer.write_latent(latent, rope, metadata)

    def use(pages, batch):
        return pages[mx.array(batch.block_table[0])].reshape(-1, 24)[:6]

    assert mx.array_equal(layer.read(metadata, use, token), mx.concatenate([latent, rope], axis=-1))


def test_a_slab_shared_with_keys_and_values():
    pool = make_pool(latent=LATENT, attention=FullAttentionSpec(4, 1, 12, dtype=mx.float32))
    latent, rope, *queries = rows(4, 2)
    mine = AttentionMetadata.build([0, 4], [4], np.array([[1]], np.int32), 4)
    theirs = AttentionMetadata.build([0, 4], [4], np.array([[2]], np.int32), 4)
    first = pool.layer("latent")
    token = first.write_latent(latent, rope, mine)
    out = first.attend_latent(*queries, mine, scale=1.0, order_token=token)
    pool.layer("attention").write(mx.ones((4, 1, 12)), mx.ones((4, 1, 12)), theirs)
    mx.eval(out, pool.arrays())
    assert mx.array_equal(first.kv_cache[1], mx.concatenate([latent, rope], axis=-1))
    assert mx.array_equal(pool.layer("attention").kv_cache[2], mx.ones((2, 4, 1, 12)))


def test_refusals():
    pool = make_pool(latent=LATENT, attention=FullAttentionSpec(4, 1, 12, dtype=mx.float32))
    metadata = AttentionMetadata.build([0, 2], [2], np.array([[1]], np.int32), 4)
    with pytest.raises(MetalKVError, match=r"for layer 'latent', got \(\(2, 8\), \(2, 8\)\)"):
        pool.layer("latent").write_latent(mx.zeros((2, 8)), mx.zeros((2, 8)), metadata)
    with pytest.raises(MetalKVError, match="a layer with latent rows, got FullAttentionSpec"):
        pool.layer("attention").write_latent(mx.zeros((2, 16)), mx.zeros((2, 8)), metadata)
