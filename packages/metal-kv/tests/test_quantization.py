import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import quantized_gather_kv_cache
from metal_kv import (
    AttentionMetadata,
    CacheGroup,
    CacheLayout,
    FullAttentionSpec,
    KVCachePool,
    LatentSpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
    SpecError,
    bytes_per_block,
    quantize_specs,
    with_block_size,
)

FULL = FullAttentionSpec(16, 2, 64, dtype=mx.float32)
WINDOW = SlidingWindowSpec(16, 4, 64, dtype=mx.float32, sliding_window=5)
FORMATS = [("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("int4", "int4"), ("int8", "int4"), (None, "int8")]
# The largest error of an element, relative to the largest of its head: half a step (the shortest mantissa for fp8),
# and for int4, whose range is at most twice the largest, half of two fifteenths, and float16 scales.
ERRORS = {"int8": 0.5 / 127, "fp8_e4m3": 2.0**-4, "int4": 1 / 15 + 2.0**-9, None: 2.0**-20}


def groups_of(specs):
    """One group for each kind of layer, its blocks scaled until all pages are equal: as vLLM plans it."""
    largest = max(spec.page_size_bytes for spec in specs.values())
    scaled = {n: with_block_size(s, s.block_size * (largest // s.page_size_bytes)) for n, s in specs.items()}
    return [CacheGroup((name,), spec) for name, spec in scaled.items()]


@pytest.mark.parametrize(("key", "value"), FORMATS)
def test_rows_of_different_heads_share_slabs(key, value):
    specs = quantize_specs({"f": FULL, "w": WINDOW}, key, value)
    assert specs["w"].window == 5
    groups = groups_of(specs)
    assert bytes_per_block(groups) == specs["w"].page_size_bytes
    pool = KVCachePool(CacheLayout.from_groups(groups, 6))
    assert pool.nbytes == sum(array.nbytes for array in pool.arrays()) == 6 * specs["w"].page_size_bytes
    assert bytes_per_block(groups) < (0.3 if value == "int4" else 0.7) * WINDOW.page_size_bytes
    tables = [np.array([[3, 1]], np.int32), np.array([[5, 2]], np.int32)]
    rng = np.random.default_rng(0)
    written = {}
    for begin, end in ((0, 12), (12, 19)):
        for table, group in zip(tables, groups, strict=True):
            layer = pool.layer(group.layer_names[0])
            shape = (end - begin, layer.spec.num_kv_heads, 64)
            pair = [rng.standard_normal(shape).astype(np.float32) for _ in "kv"]
            metadata = AttentionMetadata.build([0, end - begin], [end], table, group.block_size)
            layer.write(*map(mx.array, pair), metadata)
            written.setdefault(layer.name, []).append(pair)
        mx.eval(pool.arrays())
    for table, (name, parts) in zip(tables, written.items(), strict=True):
        layer = pool.layer(name)
        got = quantized_gather_kv_cache(layer.kv_cache, mx.array(table[0]), 19, layer.spec.rows)
        for half, element in enumerate((key, value)):
            expected = np.concatenate([part[half] for part in parts])
            largest = np.abs(expected).max(axis=-1, keepdims=True)
            assert (np.abs(np.array(got[half]) - expected) <= ERRORS[element] * largest).all()
    assert not any(array[0].any().item() for array in pool.arrays())


@pytest.mark.parametrize(("key", "value"), FORMATS)
@pytest.mark.parametrize("spec", [FULL, WINDOW])
def test_attention_is_close_to_that_over_a_float_cache(spec, key, value):
    """With values of at most V and weights that sum to 1, the values' error is at most their own; the keys' moves
    a score by at most scale * |q| * |error|, and the output by twice that share of 2V."""
    specs = {"a": spec}
    plain, packed = (
        KVCachePool(CacheLayout.from_groups([CacheGroup(("a",), kind)], 4))
        for kind in (spec, quantize_specs(specs, key, value)["a"])
    )
    rng = np.random.default_rng(1)
    keys, values = (rng.standard_normal((21, spec.num_kv_heads, 64)).astype(np.float32) for _ in "kv")
    query = rng.standard_normal((21, 4, 64)).astype(np.float32)
    metadata = AttentionMetadata.build([0, 21], [21], np.array([[2, 3]], np.int32), 16)
    outputs = []
    for pool in (plain, packed):
        layer = pool.layer("a")
        token = layer.write(mx.array(keys), mx.array(values), metadata)
        outputs.append(np.array(layer.attend(mx.array(query), metadata, scale=0.125, order_token=token)))
    key_error = 8 * ERRORS[key] * np.abs(keys).max()  # Euclidean, of a head of 64
    moved = 0.125 * np.linalg.norm(query, axis=-1).max() * key_error
    bound = ERRORS[value] * np.abs(values).max() + min(1.0, 2 * moved) * np.abs(values).max()
    assert np.abs(outputs[0] - outputs[1]).max() <= bound


def test_blocks_are_copied_zeroed_and_cut():
    spec = quantize_specs({"a": FULL}, "int8", "int4")["a"]
    pool = KVCachePool(CacheLayout.from_groups([CacheGroup(("a",), spec, kernel_block_size=8)], 5))
    layer = pool.layer("a")
    assert layer.kv_cache.shape == (10, 8, spec.rows.row_words)
    keys, values = (mx.random.normal((19, 2, 64)) for _ in "kv")
    table = np.array([[3, 1]], np.int32)
    layer.write(keys, values, AttentionMetadata.build([0, 19], [19], table, 16, kernel_block_size=8))
    mx.eval(pool.arrays())
    pool.copy_blocks([(3, 4), (1, 2)])
    before, after = (
        quantized_gather_kv_cache(layer.kv_cache, mx.array(row, mx.int32), 19, spec.rows)
        for row in ([6, 7, 2], [8, 9, 4])
    )
    assert all(mx.array_equal(old, new) for old, new in zip(before, after, strict=True))
    pool.zero_blocks([4])
    assert not layer.kv_cache[8:].any().item()


def test_a_step_writes_in_place():
    specs = quantize_specs({"f": FULL, "w": WINDOW}, "int8", "int8")
    groups = groups_of(specs)
    pool = KVCachePool(CacheLayout.from_groups(groups, 4_000))
    metadata = [AttentionMetadata.build([0, 3], [3], np.array([[i + 1]], np.int32), 16) for i in range(2)]
    for _ in range(3):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        outputs = []
        for name in ("f", "w"):
            layer = pool.layer(name)
            rows = mx.ones((3, layer.spec.num_kv_heads, 64))
            token = layer.write(rows, rows, metadata[layer.group])
            outputs.append(layer.attend(mx.ones((3, 4, 64)), metadata[layer.group], scale=1.0, order_token=token))
        mx.eval(outputs, pool.arrays())
        del layer, outputs, token
        assert mx.get_peak_memory() - before < pool.nbytes / 10


def test_states_stay_and_latents_are_refused():
    state = RecurrentStateSpec(16, ((4, 8),), (mx.float32,))
    specs = {"a": FULL, "s": state}
    assert quantize_specs(specs, "int8", "int8")["s"] is state
    assert quantize_specs(specs, None, None) == specs
    with pytest.raises(SpecError, match="latent rows in layer 'l'"):
        quantize_specs({"l": LatentSpec(16, 64, 16, dtype=mx.float32)}, "int8", "int8")
    with pytest.raises(SpecError, match="layer 'odd' cannot be stored as int4"):
        quantize_specs({"odd": FullAttentionSpec(16, 2, 60, dtype=mx.float32)}, "int4", "int4")
    with pytest.raises(SpecError, match="rows of 2 heads of 64"):
        FullAttentionSpec(16, 2, 64, dtype=mx.float32, rows=quantize_specs({"w": WINDOW}, "int8", None)["w"].rows)


@pytest.mark.parametrize("heads", [(8, 256, 2, 512), (1, 256, 4, 256), (4, 128, 8, 128), (2, 64, 16, 128)])
@pytest.mark.parametrize(("element", "share"), [("int8", 0.5), ("int4", 0.25), ("fp8_e4m3", 0.5)])
def test_padding_makes_multiples_and_stays_small(heads, element, share):
    first, first_size, second, second_size = heads
    specs = {
        "a": FullAttentionSpec(16, first, first_size, dtype=mx.bfloat16),
        "b": SlidingWindowSpec(16, second, second_size, dtype=mx.bfloat16, sliding_window=128),
    }
    packed = quantize_specs(specs, element, element)
    small, large = sorted(spec.rows.row_bytes for spec in packed.values())
    assert large % small == 0
    for name, spec in specs.items():
        assert packed[name].page_size_bytes <= 1.3 * share * spec.page_size_bytes
