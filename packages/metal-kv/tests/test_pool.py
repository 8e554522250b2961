import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metal_kv import (
    AttentionMetadata,
    BlockTable,
    CacheGroup,
    CacheLayout,
    FullAttentionSpec,
    KVCachePool,
    LatentSpec,
    MetalKVError,
    RecurrentStateSpec,
    SlidingWindowSpec,
)

BLOCK = 4
FULL = FullAttentionSpec(BLOCK, 4, 16, dtype=mx.float32)
WINDOW = SlidingWindowSpec(BLOCK, 2, 32, dtype=mx.float32, sliding_window=3)
HALF = FullAttentionSpec(2 * BLOCK, 2, 32, dtype=mx.float16)
GROUPS = [CacheGroup(("f0", "f1"), FULL), CacheGroup(("w0",), WINDOW), CacheGroup(("h0", "h1"), HALF)]


def make_pool(num_blocks, groups=GROUPS):
    return KVCachePool(CacheLayout.from_groups(groups, num_blocks))


def rows_for(spec, num_tokens, seed):
    shape = (num_tokens, spec.num_kv_heads, spec.head_size)
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(np.float16).astype(np.float32) for _ in "kv")


def stored(layer, block_ids, num_tokens):
    """Keys and values of a request, read with numpy from the layer's pages."""
    pages = np.array(layer.kv_cache.astype(mx.float32))[block_ids]
    return tuple(pages[:, half].reshape(-1, *pages.shape[-2:])[:num_tokens] for half in (0, 1))


@given(st.lists(st.lists(st.integers(0, 7), min_size=3, max_size=3), min_size=1, max_size=4), st.randoms())
def test_every_written_row_is_read_back(steps, random):
    """Three requests, each in every group, grow by ragged steps over shuffled blocks of one shared pool."""
    pool = make_pool(1 + 3 * 3 * 7)
    free = list(range(1, pool.layout.num_blocks))
    random.shuffle(free)
    tables = [BlockTable(3, 7) for _ in GROUPS]
    lens = [0, 0, 0]
    expected = {name: [[[], []] for _ in lens] for name in pool.layer_names}
    for seed, new in enumerate(steps):
        starts = np.cumsum([0, *new])
        lens = [old + more for old, more in zip(lens, new, strict=True)]
        for table, group in zip(tables, GROUPS, strict=True):
            for row, length in enumerate(lens):
                missing = -(-length // group.block_size) - table.num_blocks[row]
                table.append_row(row, [free.pop() for _ in range(missing)])
        metadata = [
            AttentionMetadata.build(starts, lens, table.rows(3), group.block_size)
            for table, group in zip(tables, GROUPS, strict=True)
        ]
        for name in pool.layer_names:
            layer = pool.layer(name)
            pair = rows_for(layer.spec, starts[-1], seed)
            layer.write(*map(mx.array, pair), metadata[layer.group])
            for row in range(3):
                for half in (0, 1):
                    expected[name][row][half].extend(pair[half][starts[row] : starts[row + 1]])
        mx.eval(pool.arrays())
    for name in pool.layer_names:
        layer = pool.layer(name)
        for row, length in enumerate(lens):
            got = stored(layer, tables[layer.group].row(row), length)
            for half in (0, 1):
                assert len(got[half]) == len(expected[name][row][half])
                np.testing.assert_array_equal(got[half], np.reshape(expected[name][row][half], got[half].shape))
    assert not any(array[0].any().item() for array in pool.arrays())


def attention(query, keys, values, scale, window):
    """One request's causal attention in float64, with grouped heads."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (np.repeat(array, groups, axis=1).astype(np.float64) for array in (keys, values))
    out = np.zeros(query.shape)
    for i, row in enumerate(query.astype(np.float64)):
        position = len(keys) - len(query) + i
        seen = slice(max(0, position - window + 1) if window else 0, position + 1)
        scores = scale * np.einsum("hd,nhd->hn", row, keys[seen])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[i] = np.einsum("hn,nhd->hd", weights / weights.sum(axis=1, keepdims=True), values[seen])
    return out


@pytest.mark.parametrize(
    ("name", "asked", "window"), [("f0", None, None), ("w0", None, 3), ("f1", 5, 5), ("w0", 2, 2)]
)
def test_attention_sees_the_context_and_its_window(name, asked, window):
    pool = make_pool(8)
    layer = pool.layer(name)
    table = np.array([[6, 2, 0], [3, 7, 5]], np.int32)
    keys, values = rows_for(layer.spec, 5 + 11, 1)
    order = [*range(4), *range(5, 13)]
    first = AttentionMetadata.build([0, 4, 12], [4, 8], table, BLOCK)
    layer.write(mx.array(keys[order]), mx.array(values[order]), first)
    mx.eval(pool.arrays())
    second = AttentionMetadata.build([0, 1, 4], [5, 11], table, BLOCK)
    order = [4, 13, 14, 15]
    order_token = layer.write(mx.array(keys[order]), mx.array(values[order]), second)
    query = np.random.default_rng(2).standard_normal((4, 8, layer.spec.head_size)).astype(np.float32)
    out = layer.attend(mx.array(query), second, scale=0.2, sliding_window=asked, order_token=order_token)
    expected = [
        attention(query[:1], keys[:5], values[:5], 0.2, window),
        attention(query[1:], keys[5:], values[5:], 0.2, window),
    ]
    np.testing.assert_allclose(np.array(out), np.concatenate(expected), rtol=1e-4, atol=1e-5)


def peak_growth(work):
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    work()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    "groups",
    [
        [CacheGroup(("a",), FULL)],
        [CacheGroup(("a",), FULL), CacheGroup(("b",), WINDOW)],
        [CacheGroup(("a",), HALF), CacheGroup(("b",), WINDOW), CacheGroup(("c",), FULL)],
    ],
    ids=["one group", "two head counts", "two dtypes"],
)
def test_a_step_never_copies_a_slab(groups):
    pool = make_pool(20_000, groups)
    metadata = []
    for i, group in enumerate(groups):
        table = np.array([[9, 0, 0], [i + 10, 20 + i, 30 + i]], np.int32)
        metadata.append(AttentionMetadata.build([0, 2, 5], [2, 9], table, group.block_size))

    def step():
        outputs = []
        for name in pool.layer_names:
            layer = pool.layer(name)
            pair = rows_for(layer.spec, 5, 0)
            order_token = layer.write(*map(mx.array, pair), metadata[layer.group])
            query = mx.ones((5, 8, layer.spec.head_size))
            outputs.append(
                layer.attend(query.astype(layer.spec.dtype), metadata[layer.group], scale=1.0, order_token=order_token)
            )
        mx.eval(outputs, pool.arrays())

    slab_bytes = pool.nbytes // pool.layout.num_slabs
    for _ in range(3):
        assert peak_growth(step) < slab_bytes / 10
    assert peak_growth(lambda: pool.copy_blocks([(1, 15_000), (2, 16_000)])) < slab_bytes / 10
    assert peak_growth(lambda: pool.zero_blocks([15_000])) < slab_bytes / 10


@given(st.data())
def test_a_copied_block_holds_the_same_in_every_layer(data):
    pool = make_pool(9)
    ids = data.draw(st.permutations(range(1, 9)))
    pairs = list(zip(ids[:3], ids[3:6], strict=True))
    for name in pool.layer_names:
        layer = pool.layer(name)
        shape = layer.kv_cache.shape
        if layer.group == 0:  # the other groups see the same bytes
            values = mx.random.normal(shape).astype(layer.spec.dtype)
            layer.update(
                lambda pages, values=values: mx.where((mx.arange(9) > 0)[:, None, None, None, None], values, pages)
            )
    mx.eval(pool.arrays())
    before = [np.array(array.reshape(9, -1)) for array in pool.arrays()]
    pool.copy_blocks(pairs)
    pool.zero_blocks([ids[6], 0])
    for old, array in zip(before, pool.arrays(), strict=True):
        new = np.array(array.reshape(9, -1).view(mx.float32))
        for source, destination in pairs:
            np.testing.assert_array_equal(new[destination], old[source])
            np.testing.assert_array_equal(new[source], old[source])
        assert not new[ids[6]].any()
        np.testing.assert_array_equal(new[ids[7]], old[ids[7]])
        assert not new[0].any()


@pytest.mark.parametrize("pairs", [[(1, 0)], [(1, 9)], [(-1, 2)], [(1, 3), (2, 3)], [(1, 2), (2, 3)]])
def test_copies_that_have_no_meaning_are_refused(pairs):
    with pytest.raises(MetalKVError, match=r"\[KVCachePool.copy_blocks\] expected"):
        make_pool(9).copy_blocks(pairs)


def test_a_block_outside_the_pool_cannot_be_zeroed():
    with pytest.raises(MetalKVError, match="expected"):
        make_pool(9).zero_blocks([9])
    make_pool(9).zero_blocks([])


def test_kernel_blocks_address_the_same_bytes():
    spec = FullAttentionSpec(8, 2, 16, dtype=mx.float32)
    pool = make_pool(4, [CacheGroup(("a",), spec, kernel_block_size=4)])
    layer = pool.layer("a")
    assert layer.kv_cache.shape == (8, 2, 4, 2, 16)
    metadata = AttentionMetadata.build([0, 11], [11], np.array([[3, 1]], np.int32), 8, kernel_block_size=4)
    keys, values = rows_for(spec, 11, 3)
    layer.write(mx.array(keys), mx.array(values), metadata)
    got = stored(layer, [6, 7, 2], 11)
    np.testing.assert_array_equal(got[0], keys)
    np.testing.assert_array_equal(got[1], values)
    pool.copy_blocks([(3, 2)])
    np.testing.assert_array_equal(stored(layer, [4, 5, 2], 11)[0], keys)


def test_states_and_latent_rows_share_slabs_with_attention():
    latent = LatentSpec(8, 48, 16, dtype=mx.float32)
    state = RecurrentStateSpec(8, ((3, 5), (7,)), (mx.float32, mx.float16), page_size_padded=latent.page_size_bytes)
    attention_spec = FullAttentionSpec(8, 2, 16, dtype=mx.float32)
    pool = make_pool(6, [CacheGroup((n,), s) for n, s in [("l", latent), ("s", state), ("a", attention_spec)]])
    assert pool.nbytes == 6 * latent.page_size_bytes
    rows = mx.random.normal((8, 64))
    states = [mx.random.normal((2, 3, 5)), mx.random.normal((2, 7)).astype(mx.float16)]
    ids = mx.array([4, 2])

    def put(pages, where, what):
        pages[where] = what
        return pages

    pool.layer("l").update(lambda pages: put(pages, mx.array([1]), rows[None]))
    pool.layer("s").update(lambda pages: put(pages, ids, state.pack(states)))
    mx.eval(pool.arrays())
    assert mx.array_equal(pool.layer("l").kv_cache[1], rows)
    for got, expected in zip(state.unpack(pool.layer("s").kv_cache[ids]), states, strict=True):
        assert mx.array_equal(got, expected)
    for name in ("l", "s"):
        with pytest.raises(MetalKVError, match="a layer with keys and values"):
            pool.layer(name).attend(
                mx.zeros((1, 2, 16)),
                AttentionMetadata.build([0, 1], [1], np.array([[1]], np.int32), 8),
                scale=1.0,
            )


def test_rows_of_another_shape_are_refused_and_the_cache_stays():
    pool = make_pool(4)
    layer = pool.layer("f0")
    metadata = AttentionMetadata.build([0, 2], [2], np.array([[1]], np.int32), BLOCK)
    with pytest.raises(MetalKVError, match=r"shape \(2, 4, 16\) for layer 'f0', got \(3, 4, 16\)"):
        layer.write(mx.zeros((3, 4, 16)), mx.zeros((3, 4, 16)), metadata)
    assert layer.kv_cache.shape == (4, 2, BLOCK, 4, 16)


def test_rows_are_converted_to_the_caches_dtype():
    pool = make_pool(4)
    layer = pool.layer("h0")
    metadata = AttentionMetadata.build([0, 1], [1], np.array([[1]], np.int32), 8)
    layer.write(mx.full((1, 2, 32), 1.5), mx.full((1, 2, 32), 2.5), metadata)
    assert layer.kv_cache.dtype == mx.float16
    assert stored(layer, [1], 1)[1].max() == 2.5


def test_an_unknown_layer_is_refused_by_name():
    pool = make_pool(4)
    assert pool.layer_names == ("f0", "f1", "w0", "h0", "h1")
    assert sum(array.nbytes for array in pool.arrays()) == pool.nbytes
    with pytest.raises(MetalKVError, match=r"got 'layers\.9'"):
        pool.layer("layers.9")


def test_a_reset_pool_is_empty_and_no_larger():
    pool = make_pool(9_000)
    layer = pool.layer("f0")
    metadata = AttentionMetadata.build([0, 3], [3], np.array([[5]], np.int32), BLOCK)
    keys, values = (mx.ones((3, 4, 16)) for _ in "kv")
    token = layer.write(keys, values, metadata)
    layer.attend(mx.ones((3, 4, 16)), metadata, scale=1.0, order_token=token)
    mx.eval(pool.arrays())
    slab_bytes = pool.nbytes // pool.layout.num_slabs
    assert peak_growth(pool.reset) < slab_bytes / 10
    assert not any(array.any().item() for array in pool.arrays())
    layer.write(keys, values, metadata)
    np.testing.assert_array_equal(stored(layer, [5], 3)[0], np.ones((3, 4, 16)))
