import math

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metal_kv import (
    CacheGroup,
    CacheLayout,
    FullAttentionSpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
    SpecError,
    bytes_per_block,
    max_blocks_per_request,
)

FULL = FullAttentionSpec(16, 4, 64, dtype=mx.float16)
WINDOW = SlidingWindowSpec(16, 8, 32, dtype=mx.float16, sliding_window=64)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(2, 50))
def test_bytes_add_up_whatever_the_groups_share(layers_per_group, num_blocks):
    groups = [
        CacheGroup(tuple(f"{g}.{i}" for i in range(n)), FULL if g % 2 else WINDOW)
        for g, n in enumerate(layers_per_group)
    ]
    layout = CacheLayout.from_groups(groups, num_blocks)
    assert layout.num_slabs == max(layers_per_group)
    assert layout.bytes_per_block == bytes_per_block(groups) == max(layers_per_group) * FULL.page_size_bytes
    assert layout.nbytes == num_blocks * layout.bytes_per_block
    places = layout.places()
    assert list(places) == [name for group in groups for name in group.layer_names]
    assert len({(place.group, place.slab) for place in places.values()}) == len(places)
    for place in places.values():
        view_bytes = math.prod(place.view_shape) * place.spec.page_dtype.size
        assert view_bytes == num_blocks * layout.page_sizes[place.slab]


def test_layers_of_a_group_may_differ():
    wide = FullAttentionSpec(16, 2, 256, dtype=mx.float16)
    layout = CacheLayout.from_groups([CacheGroup(("a", "b"), (FULL, wide))], 3)
    assert layout.page_sizes == (FULL.page_size_bytes, wide.page_size_bytes)
    assert layout.places()["b"].view_shape == (3, 2, 16, 2, 256)


def test_kernel_blocks_cut_the_same_bytes_finer():
    spec = FullAttentionSpec(160, 2, 64, dtype=mx.float16)
    layout = CacheLayout.from_groups([CacheGroup(("a",), spec, kernel_block_size=32)], 4)
    assert layout.places()["a"].view_shape == (20, 2, 32, 2, 64)
    assert layout.nbytes == 4 * spec.page_size_bytes


def test_states_share_a_slab_with_attention_when_padded():
    state = RecurrentStateSpec(16, ((4, 8),), (mx.float32,), page_size_padded=FULL.page_size_bytes)
    layout = CacheLayout.from_groups([CacheGroup(("a",), FULL), CacheGroup(("s",), state)], 4)
    assert layout.num_slabs == 1


def test_groups_add_their_needs_up():
    groups = [CacheGroup(("a",), FULL), CacheGroup(("b",), WINDOW)]
    assert max_blocks_per_request(groups, 1000, 32) == 63 + (math.ceil(95 / 16) + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheGroup((), FULL), "at least one layer"),
        (lambda: CacheGroup(("a", "b"), (FULL,)), "1 specs for 2 layers"),
        (
            lambda: CacheGroup(("a", "b"), (FULL, FullAttentionSpec(32, 4, 64, dtype=mx.float16))),
            "one block size",
        ),
        (lambda: CacheGroup(("a",), FULL, kernel_block_size=12), "divides 16, got 12"),
        (
            lambda: CacheGroup(("a",), RecurrentStateSpec(16, ((4,),), (mx.float32,)), kernel_block_size=8),
            "cannot be cut",
        ),
        (lambda: CacheLayout.from_groups([], 4), "at least one layer"),
        (
            lambda: CacheLayout.from_groups([CacheGroup(("a",), FULL), CacheGroup(("a",), FULL)], 4),
            "every layer once",
        ),
        (lambda: CacheLayout.from_groups([CacheGroup(("a",), FULL)], 1), "block 0 is reserved"),
        (lambda: CacheLayout.from_groups([CacheGroup(("a",), FULL)], 2**28), "slots are 32-bit"),
        (
            lambda: bytes_per_block(
                [CacheGroup(("a",), FULL), CacheGroup(("b",), FullAttentionSpec(16, 4, 32, dtype=mx.float16))]
            ),
            "pages of 16384 bytes as layer 'a'",
        ),
        (
            lambda: bytes_per_block([CacheGroup(("a",), RecurrentStateSpec(16, ((3,),), (mx.uint8,)))]),
            "a multiple of 4 bytes",
        ),
    ],
)
def test_what_cannot_be_laid_out_is_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()
