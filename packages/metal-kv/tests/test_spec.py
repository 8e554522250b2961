import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metal_kv import (
    FullAttentionSpec,
    LatentSpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
    SpecError,
    with_block_size,
)

SIZES = st.integers(1, 64)
DTYPES = st.sampled_from([mx.float16, mx.bfloat16, mx.float32])


@given(SIZES, SIZES, SIZES, DTYPES)
def test_page_bytes_of_attention_count_keys_and_values(block_size, num_kv_heads, head_size, dtype):
    spec = FullAttentionSpec(block_size, num_kv_heads, head_size, dtype=dtype)
    assert spec.page_size_bytes == 2 * block_size * num_kv_heads * head_size * dtype.size
    assert spec.page_size_bytes == mx.zeros(spec.page_shape, spec.page_dtype).nbytes


def test_values_of_the_same_size_may_be_named():
    named = FullAttentionSpec(16, 2, 64, 64, dtype=mx.float16)
    assert named == FullAttentionSpec(16, 2, 64, dtype=mx.float16)
    assert hash(named) == hash(FullAttentionSpec(16, 2, 64, dtype=mx.float16))


def test_values_of_another_size_are_refused():
    with pytest.raises(SpecError, match="head_size=192 and head_size_v=128"):
        FullAttentionSpec(16, 2, 192, 128, dtype=mx.float16)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(SpecError, match=">= 1, got 0"):
        FullAttentionSpec(*sizes, dtype=mx.float16)


def test_window_must_be_positive():
    with pytest.raises(SpecError, match="sliding_window >= 1"):
        SlidingWindowSpec(16, 1, 64, dtype=mx.float16, sliding_window=0)


@given(st.integers(1, 32), st.integers(1, 300), st.integers(1, 500), st.integers(1, 100))
def test_sliding_window_blocks_hold_every_live_token(block_size, window, num_tokens, step_tokens):
    spec = SlidingWindowSpec(block_size, 1, 8, dtype=mx.float16, sliding_window=window)
    promised = spec.max_blocks_per_request(num_tokens, step_tokens)
    for start in range(0, num_tokens, step_tokens):
        oldest = max(0, start - window + 1)
        last = min(start + step_tokens, num_tokens) - 1
        assert last // block_size - oldest // block_size + 1 <= promised


def test_full_attention_and_states_say_how_many_blocks_a_request_holds():
    assert FullAttentionSpec(16, 1, 8, dtype=mx.float16).max_blocks_per_request(33) == 3
    assert RecurrentStateSpec(16, ((4,),), (mx.float32,)).max_blocks_per_request(1000) == 1


def test_latent_rows_hold_the_latent_then_the_rotary_key():
    spec = LatentSpec(16, 512, 64, dtype=mx.bfloat16)
    assert spec.page_shape == (16, 576)
    assert spec.page_size_bytes == 16 * 576 * 2
    assert with_block_size(spec, 32).page_size_bytes == 2 * spec.page_size_bytes


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), DTYPES), min_size=1, max_size=3),
    st.integers(0, 40),
    st.integers(1, 4),
)
def test_states_survive_packing(arrays, padding, num_blocks):
    shapes, dtypes = tuple(tuple(shape) for shape, _ in arrays), tuple(dtype for _, dtype in arrays)
    spec = RecurrentStateSpec(8, shapes, dtypes)
    spec = RecurrentStateSpec(8, shapes, dtypes, page_size_padded=spec.page_size_bytes + padding)
    states = [
        mx.random.normal((num_blocks, *shape)).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    pages = spec.pack(states)
    assert pages.shape == (num_blocks, *spec.page_shape)
    assert pages.dtype == spec.page_dtype
    assert math.prod(spec.page_shape) * spec.page_dtype.size == spec.page_size_bytes
    for state, unpacked in zip(states, spec.unpack(pages), strict=True):
        assert unpacked.dtype == state.dtype
        np.testing.assert_array_equal(np.array(unpacked.astype(mx.float32)), np.array(state.astype(mx.float32)))


def test_states_need_a_dtype_each_and_room_on_their_page():
    with pytest.raises(SpecError, match="1 shapes and 2 dtypes"):
        RecurrentStateSpec(8, ((4,),), (mx.float32, mx.float16))
    with pytest.raises(SpecError, match="page_size_padded >= 16"):
        RecurrentStateSpec(8, ((4,),), (mx.float32,), page_size_padded=12)
    with pytest.raises(SpecError, match="expected 1 arrays, got 0"):
        RecurrentStateSpec(8, ((4,),), (mx.float32,)).pack([])
