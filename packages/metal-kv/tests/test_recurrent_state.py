"""States of recurrent layers: each request's own, through any schedule, in slabs that attention writes to as well."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metal_kernels import RaggedBatch
from metal_kv import (
    AttentionMetadata,
    BlockTableError,
    CacheGroup,
    CacheLayout,
    FullAttentionSpec,
    KVCachePool,
    MetalKVError,
    RecurrentStateSpec,
    state_blocks,
    unify_page_sizes,
)

BLOCK = 4
STATE = RecurrentStateSpec(BLOCK, ((3, 5), (2, 3)), (mx.float16, mx.float32))
ROWS = FullAttentionSpec(BLOCK, 1, 4, dtype=mx.float32)


def batch(query_lens: list[int], seq_lens: list[int], table: list[list[int]]) -> RaggedBatch:
    starts = np.cumsum([0, *query_lens]).astype(np.int32)
    return RaggedBatch(starts, np.array(seq_lens, np.int32), np.array(table, np.int32))


def states_of(values: list[float]) -> list[mx.array]:
    """States that are filled with one number each."""
    column = mx.array(values, mx.float32)
    return [
        mx.broadcast_to(column.reshape(-1, *[1] * len(shape)), (len(values), *shape)).astype(dtype)
        for shape, dtype in zip(STATE.shapes, STATE.dtypes, strict=True)
    ]


def values_of(states: tuple[mx.array, ...]) -> list[float]:
    for array in states:
        flat = array.reshape(array.shape[0], -1)
        assert mx.array_equal(flat, mx.broadcast_to(flat[:, :1], flat.shape))
    first, second = (array.reshape(array.shape[0], -1)[:, 0].astype(mx.float32) for array in states)
    assert mx.array_equal(first, second)
    return first.tolist()


def hybrid_pool(num_blocks: int) -> KVCachePool:
    specs = unify_page_sizes({"rows": ROWS, "state": STATE})
    groups = [CacheGroup((name,), spec) for name, spec in specs.items()]
    return KVCachePool(CacheLayout.from_groups(groups, num_blocks))


def test_a_state_lies_in_the_block_of_the_last_token_it_has_seen() -> None:
    table = [[7, 0, 0], [3, 5, 0], [9, 2, 6], [4, 0, 0]]
    blocks = state_blocks(batch([4, 1, 1, 1], [4, 5, 12, 2], table), BLOCK)
    assert blocks.after.tolist() == [7, 5, 6, 4]
    assert blocks.before.tolist() == [0, 3, 6, 4]


def test_rows_that_run_past_a_block_leave_a_state_in_it() -> None:
    table = [[7, 5, 0], [0, 5, 6], [0, 0, 6], [8, 0, 0], [2, 4, 0]]
    blocks = state_blocks(batch([6, 10, 9, 4, 1], [6, 10, 9, 4, 5], table), BLOCK)
    assert blocks.inside.tolist() == [7, 5, 0, 0, 0]
    assert blocks.rows_until.tolist() == [4, 8, 0, 0, 0]
    continued = state_blocks(batch([5], [12], [[3, 9, 6]]), BLOCK)
    assert (continued.inside.tolist(), continued.rows_until.tolist()) == ([9], [1])


@settings(max_examples=40, deadline=None)
@given(
    order=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5, unique=True), min_size=1, max_size=8),
    evaluated=st.booleans(),
    moves=st.randoms(use_true_random=False),
)
def test_states_of_any_requests_of_a_step(order: list[list[int]], evaluated: bool, moves: object) -> None:
    """Steps read and leave the states of some requests, in any order, some of them in another block than before."""
    pool = hybrid_pool(12)
    layer, block_of, value_of, free = pool.layer("state"), {}, {}, list(range(1, 12))
    for step, who in enumerate(order):
        known = [name for name in who if name in block_of]
        if known:
            found = values_of(layer.read_states(mx.array([block_of[name] for name in known], mx.int32)))
            assert found == [value_of[name] for name in known]
        for name in who:
            if name not in block_of or moves.random() < 0.3:  # type: ignore[attr-defined]
                free += [block_of[name]] if name in block_of else []
                block_of[name] = free.pop(0)
            value_of[name] = float(10 * step + name)
        layer.write_states(
            states_of([value_of[name] for name in who]), mx.array([block_of[name] for name in who], mx.int32)
        )
        if evaluated:
            mx.eval(pool.arrays())
    names = list(block_of)
    found = values_of(layer.read_states(mx.array([block_of[name] for name in names], mx.int32)))
    assert found == [value_of[name] for name in names]


def test_a_block_that_changes_hands_is_not_written_to_afterwards() -> None:
    pool = hybrid_pool(6)
    state, rows = pool.layer("state"), pool.layer("rows")
    size = rows.spec.block_size
    state.write_states(states_of([1.0, 2.0]), mx.array([4, 2]))
    mx.eval(pool.arrays())
    metadata = AttentionMetadata.build(np.array([0, 1]), np.array([1]), np.array([[4]], np.int32), size)
    rows.write(mx.full((1, 1, 4), 7.0), mx.full((1, 1, 4), 8.0), metadata)
    state.write_states(states_of([3.0]), mx.array([2]))
    mx.eval(pool.arrays())
    assert rows.kv_cache[4, :, 0, 0, 0].tolist() == [7.0, 8.0]
    assert values_of(state.read_states(mx.array([2]))) == [3.0]
    assert pool.layer("state").kv_cache.shape[0] == 6


def test_states_are_found_after_copies_and_not_after_a_reset() -> None:
    pool = hybrid_pool(6)
    layer = pool.layer("state")
    layer.write_states(states_of([1.0, 2.0]), mx.array([4, 2]))
    pool.copy_blocks([(4, 5)])
    assert values_of(layer.read_states(mx.array([2, 5, 4]))) == [2.0, 1.0, 1.0]
    layer.write_states(states_of([3.0]), mx.array([4]))
    pool.reset()
    assert values_of(layer.read_states(mx.array([4, 2]))) == [0.0, 0.0]


def test_a_request_without_rows_has_no_part_in_a_step() -> None:
    blocks = state_blocks(batch([0, 1], [4, 1], [[0], [3]]), BLOCK)
    assert blocks.after.tolist()[1] == 3


@pytest.mark.parametrize(
    ("query_len", "seq_len", "table"),
    [(1, 5, [[3, 0]]), (1, 5, [[0, 3]]), (2, 9, [[3, 5]])],
)
def test_a_state_needs_a_block(query_len: int, seq_len: int, table: list[list[int]]) -> None:
    with pytest.raises(BlockTableError, match="a block for every state"):
        state_blocks(batch([query_len], [seq_len], table), BLOCK)


def test_what_is_written_is_read() -> None:
    pool = hybrid_pool(6)
    layer = pool.layer("state")
    states = [
        mx.random.normal((2, *shape)).astype(dtype) for shape, dtype in zip(STATE.shapes, STATE.dtypes, strict=True)
    ]
    layer.write_states(states, mx.array([4, 2]))
    mx.eval(pool.arrays())
    read = layer.read_states(mx.array([2, 4]))
    for array, written in zip(read, states, strict=True):
        assert array.dtype == written.dtype
        assert mx.array_equal(array, written[::-1])


def test_any_bits_survive() -> None:
    pool = KVCachePool(CacheLayout.from_groups([CacheGroup(("s",), RecurrentStateSpec(1, ((6,),), (mx.uint32,)))], 3))
    bits = mx.array([[0x7FC00001, 0xFFFFFFFF, 0x00000001, 0x7F800001, 0x80000000, 12345]], mx.uint32)
    pool.layer("s").write_states([bits], mx.array([2]))
    mx.eval(pool.arrays())
    assert pool.layer("s").read_states(mx.array([2]))[0].tolist() == bits.tolist()


def test_misshapen_states_and_other_layers_are_refused() -> None:
    pool = hybrid_pool(4)
    with pytest.raises(MetalKVError, match="expected arrays of shapes"):
        pool.layer("state").write_states(states_of([1.0, 2.0]), mx.array([1]))
    with pytest.raises(MetalKVError, match="expected a recurrent layer"):
        pool.layer("rows").read_states(mx.array([1]))


def test_writing_copies_no_slab() -> None:
    spec = RecurrentStateSpec(1, ((1024,),), (mx.float32,))
    pool = KVCachePool(CacheLayout.from_groups([CacheGroup(("s",), spec)], 4096))
    layer, ids = pool.layer("s"), mx.array([7, 9])
    for step in range(3):
        mx.eval(pool.arrays())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        (state,) = layer.read_states(ids)
        layer.write_states([state + 1], ids)
        mx.eval(pool.arrays())
        assert mx.get_peak_memory() - before < pool.nbytes // 8
        assert layer.read_states(ids)[0][:, 0].tolist() == [step + 1] * 2


steps = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 6), st.sampled_from(["run", "run", "run", "leave", "fork"])),
    min_size=1,
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(schedule=steps, order=st.randoms(use_true_random=False))
def test_every_request_reads_its_own_state_under_any_schedule(
    schedule: list[tuple[int, int, str]], order: object
) -> None:
    """A state here is the running sum of a request's tokens; attention pages of the same slab are written as well."""
    pool = hybrid_pool(64)
    layer, rows = pool.layer("state"), pool.layer("rows")
    size = layer.spec.block_size
    free = list(range(1, 64))
    order.shuffle(free)  # type: ignore[attr-defined]
    requests: dict[int, dict[str, list[int]]] = {}
    for who, count, what in schedule:
        if what == "leave":
            gone = requests.pop(who, None)
            free.extend(gone["state"] + gone["rows"] if gone else [])
            continue
        if what == "fork" and who in requests and who + 4 not in requests:
            full = len(requests[who]["tokens"]) // size
            ends = [end for end in requests[who]["ends"] if end % size == 0 and end > 0]
            if full and ends:
                # A new request with the same prefix starts from a copy of the block that was full then.
                end, copy, pages = ends[-1], free.pop(), [free.pop() for _ in range(ends[-1] // size)]
                pool.copy_blocks([(requests[who]["state"][end // size - 1], copy)])
                requests[who + 4] = {
                    "tokens": requests[who]["tokens"][:end],
                    "state": [0] * (end // size - 1) + [copy],
                    "rows": pages,
                    "ends": [end],
                }
            continue
        request = requests.setdefault(who, {"tokens": [], "state": [], "rows": [], "ends": []})
        computed = len(request["tokens"])
        request["tokens"] += [(7 * who + computed + i) % 5 + 1 for i in range(count)]
        total = len(request["tokens"])
        for name in ("state", "rows"):
            request[name] += [free.pop() for _ in range(-(-total // size) - len(request[name]))]
        starts, lens = np.array([0, count], np.int32), np.array([total], np.int32)
        metadata = AttentionMetadata.build(starts, lens, np.array([request["rows"]], np.int32), size)
        rows.write(mx.full((count, 1, 4), mx.nan), mx.full((count, 1, 4), mx.nan), metadata)
        blocks = state_blocks(batch([count], [total], [request["state"]]), size)
        before = values_of(layer.read_states(mx.array(blocks.before))) if computed else [0.0]
        assert before == [float(sum(request["tokens"][:computed]))]
        layer.write_states(states_of([before[0] + sum(request["tokens"][computed:])]), mx.array(blocks.after))
        mx.eval(pool.arrays())
        request["ends"].append(total)


@given(
    heads=st.integers(1, 3),
    head_size=st.integers(1, 5).map(lambda n: 4 * n),
    words=st.integers(1, 900),
    block_size=st.sampled_from([4, 8, 16]),
)
def test_unified_pages_hold_both(heads: int, head_size: int, words: int, block_size: int) -> None:
    specs = {
        "wide": FullAttentionSpec(block_size, 2 * heads, head_size, dtype=mx.float32),
        "state": RecurrentStateSpec(block_size, ((words,),), (mx.float32,)),
        "narrow": FullAttentionSpec(block_size, heads, head_size, dtype=mx.float16),
    }
    unified = unify_page_sizes(specs)
    (page_size,) = {spec.page_size_bytes for spec in unified.values()}
    assert list(unified) == list(specs)
    assert page_size >= 4 * words
    assert page_size - specs["wide"].page_size_bytes < 4 * words
    assert all(unified[name].block_size % block_size == 0 for name in ("wide", "narrow"))
    assert unified["state"].block_size == max(unified[name].block_size for name in ("wide", "narrow"))
    CacheLayout.from_groups([CacheGroup((name,), spec) for name, spec in unified.items()], 3)


def test_without_states_nothing_changes() -> None:
    specs = {"a": ROWS, "b": FullAttentionSpec(BLOCK, 2, 4, dtype=mx.float32)}
    assert unify_page_sizes(specs) == specs


def test_states_alone_have_one_page_size() -> None:
    small, large = RecurrentStateSpec(16, ((1,),), (mx.float16,)), RecurrentStateSpec(16, ((5,),), (mx.float32,))
    unified = unify_page_sizes({"small": small, "large": large}, state_block_size=1024, blocks_per_request=2)
    assert {(spec.page_size_bytes, spec.block_size) for spec in unified.values()} == {(20, 1024)}
    assert [spec.max_blocks_per_request(5000) for spec in unified.values()] == [2, 2]


def test_long_state_blocks_do_not_limit_the_pool() -> None:
    state = RecurrentStateSpec(1 << 20, ((4,),), (mx.float32,))
    layout = CacheLayout.from_groups([CacheGroup(("s",), state)], 5000)
    assert not layout.groups[0].keeps_rows
