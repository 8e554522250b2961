"""Drafts from a request's own tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_metal_plugin.spec_decode.ngram import NgramProposer


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2]),
        ([5, 3, 7, 1, 3, 8, 4, 1, 3], [8, 4, 1]),  # two tokens that match go before one
        ([3, 7, 3, 8, 3], [7, 3, 8]),  # the first occurrence
        ([4, 4], [4]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_what_followed_the_longest_suffix(tokens: list[int], drafts: list[int]) -> None:
    assert NgramProposer(1, 3).propose(np.array(tokens, np.int32), 3) == drafts


def test_suffixes_that_are_too_short_do_not_count() -> None:
    assert NgramProposer(2, 3).propose(np.array([7, 3, 8, 3], np.int32), 3) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 5))
def test_drafts_are_a_copy_of_earlier_tokens(tokens: list[int], room: int) -> None:
    drafts = NgramProposer(1, 4).propose(np.array(tokens, np.int32), room)
    assert len(drafts) <= room
    if drafts:
        places = range(len(tokens) - len(drafts))
        assert any(tokens[at] == tokens[-1] and tokens[at + 1 : at + 1 + len(drafts)] == drafts for at in places)
