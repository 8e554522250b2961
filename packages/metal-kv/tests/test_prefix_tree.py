import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metal_kv import PrefixTree

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)
schedules = st.lists(st.tuples(tokens, st.sampled_from(["", "tenant"]), st.sets(st.integers(1, 12))), max_size=20)


def rows_of(token_ids, salt=""):
    """Two arrays [1, 1, tokens, 2] in which a row depends on its prefix."""
    sums = np.cumsum(np.asarray(token_ids, np.float32) + 1) * 3.0 ** np.arange(len(token_ids)) % 1009
    rows = np.stack([sums, np.asarray(token_ids, np.float32) + len(salt)], axis=-1)[None, None]
    return rows, -rows


def insert(tree, token_ids, salt="", states=None):
    arrays = rows_of(token_ids, salt)
    added = tree.insert(
        np.array(token_ids, np.int32),
        lambda begin, end: [mx.array(array[:, :, begin:end]) for array in arrays],
        states,
        salt=salt,
    )
    mx.eval(added)


def check(tree, token_ids, salt=""):
    match = tree.match(np.array(token_ids, np.int32), salt=salt)
    assert match.length <= match.known <= len(token_ids)
    if match.length:
        for pieces, expected in zip(match.rows, rows_of(token_ids, salt), strict=True):
            got = np.concatenate([np.array(piece) for piece in pieces], axis=-2)
            np.testing.assert_array_equal(got, expected[:, :, : match.length])
    assert tree.nbytes <= tree.max_bytes
    assert sum(array.nbytes for array in tree.arrays) <= tree.nbytes
    return match


def common(first, second):
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@given(schedules, tokens)
def test_the_longest_common_prefix_is_found_with_its_rows(schedule, wanted):
    tree = PrefixTree(1 << 30)
    for token_ids, salt, _ in schedule:
        insert(tree, token_ids, salt)
        assert check(tree, token_ids, salt).length == len(token_ids)
    for salt in ("", "tenant"):
        best = max((common(wanted, known) for known, kept, _ in schedule if kept == salt), default=0)
        assert check(tree, wanted, salt).length == best


@given(schedules, tokens, st.integers(60, 900))
def test_a_small_tree_forgets_but_never_lies(schedule, wanted, max_bytes):
    tree = PrefixTree(max_bytes)
    for token_ids, salt, _ in schedule:
        insert(tree, token_ids, salt)
        check(tree, token_ids, salt)
        check(tree, wanted, salt)


@given(schedules, tokens, st.sampled_from([400, 1 << 30]))
def test_with_states_a_prefix_ends_where_one_was_taken(schedule, wanted, max_bytes):
    tree = PrefixTree(max_bytes, needs_state=True)
    kept = set()
    for token_ids, _, positions in schedule:
        states = {p: (tuple(token_ids[:p]), 8) for p in positions if p <= len(token_ids)}
        insert(tree, token_ids, states=states)
        kept |= {state for state, _ in states.values()}
        match = check(tree, wanted)
        assert match.state == (tuple(wanted[: match.length]) if match.length else None)
        longest = max((len(state) for state in kept if tuple(wanted[: len(state)]) == state), default=0)
        assert match.length <= longest
        if max_bytes > 400:
            assert match.length == longest


def test_shared_rows_are_held_once():
    tree = PrefixTree(1 << 20)
    insert(tree, [7] * 100 + [1, 2])
    alone = tree.nbytes
    insert(tree, [7] * 100 + [3, 4])
    assert tree.nbytes == alone + 2 * (2 * 2 * 4 + 4)
    insert(tree, [7] * 50)
    assert tree.nbytes == alone + 2 * (2 * 2 * 4 + 4)


def test_the_longest_unused_end_goes_first():
    per_token = 2 * 2 * 4 + 4
    tree = PrefixTree(8 * per_token)
    insert(tree, [1, 1, 1, 1])
    insert(tree, [2, 2, 2, 2])
    check(tree, [1, 1, 1, 1])
    insert(tree, [3, 3])
    assert check(tree, [2, 2, 2, 2]).length == 0
    assert check(tree, [1, 1, 1, 1]).length == 4


def test_what_is_too_large_is_not_kept():
    tree = PrefixTree(40)
    insert(tree, list(range(50)))
    assert tree.nbytes == 0
    assert check(tree, list(range(50))).length == 0


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_nothing_is_found_in_an_empty_tree(salt):
    match = PrefixTree(100).match(np.array([1, 2], np.int32), salt=salt)
    assert (match.length, match.rows, match.known) == (0, (), 0)
