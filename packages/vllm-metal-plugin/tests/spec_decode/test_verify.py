"""Drafts are kept as long as they are what sampling chooses."""

import mlx.core as mx
import numpy as np
import pytest
from vllm import SamplingParams

from vllm_metal_plugin.sampling import GrammarRows, Sampler, SamplingState
from vllm_metal_plugin.spec_decode.verify import verify

VOCAB = 12


def states(*params: SamplingParams) -> SamplingState:
    state = SamplingState(len(params), VOCAB, seed=0)
    for row, some in enumerate(params):
        state.add(row, f"r{row}", some, [1, 2])
    return state


def logits_for(*tokens: int) -> mx.array:
    return mx.array(np.eye(VOCAB, dtype=np.float32)[list(tokens)] * 4)


@pytest.mark.parametrize(
    ("drafts", "kept"),
    [([], [3]), ([3, 5], [3, 5, 7]), ([3, 6], [3, 5]), ([4, 5], [3]), ([-1, -1], [3]), ([3, -1], [3, 5])],
)
def test_kept_drafts_and_one_more(drafts: list[int], kept: list[int]) -> None:
    logits = logits_for(*[3, 5, 7][: 1 + len(drafts)])
    state = states(SamplingParams(temperature=0.0))
    verified = verify(logits, np.array([0], np.int32), [drafts], Sampler(VOCAB), state)
    assert verified.token_lists() == [kept]
    assert state.num_output_tokens[0] == len(kept)


def test_requests_of_a_batch_end_at_their_own_places() -> None:
    logits = logits_for(3, 5, 7, 1, 2, 4, 8)
    drafts = [[3, 5], [], [2, 4]]
    state = states(*[SamplingParams(temperature=0.0, logprobs=n) for n in (1, 0, 2)])
    verified = verify(logits, np.array([0, 1, 2], np.int32), drafts, Sampler(VOCAB), state)
    assert verified.token_lists() == [[3, 5, 7], [1], [2, 4, 8]]
    lists = verified.logprob_lists([2, 0, 1], 3)
    assert lists is not None
    assert [lists.slice_request(i, n).logprob_token_ids[:, 0].tolist() for i, n in ((2, 3), (0, 1), (1, 3))] == [
        [3, 5, 7],
        [1],
        [2, 4, 8],
    ]
    assert lists.slice_request(1, 1).logprobs.shape == (1, 3)


def test_random_requests_draw_what_they_would_draw_one_by_one() -> None:
    params = SamplingParams(temperature=1.0, seed=5, repetition_penalty=1.3, presence_penalty=0.5)
    logits = mx.random.normal((4, VOCAB), key=mx.random.key(1)) * 2
    alone = states(params)
    expected = [Sampler(VOCAB)(logits[i : i + 1], [0], alone).token_lists()[0][0] for i in range(4)]
    verified = verify(logits, np.array([0], np.int32), [expected[:3]], Sampler(VOCAB), states(params))
    assert verified.token_lists() == [expected]


def test_grammars_have_a_row_for_every_draft() -> None:
    logits = logits_for(3, 5, 7)
    only = [{3}, {6}, {7}]  # 5 is not allowed after 3
    bitmask = np.array([[sum(1 << token for token in tokens)] for tokens in only], np.int32)
    grammar = GrammarRows(np.arange(3, dtype=np.int32), bitmask)
    state = states(SamplingParams(temperature=0.0))
    verified = verify(logits, np.array([0], np.int32), [[3, 5]], Sampler(VOCAB), state, grammar)
    assert verified.token_lists() == [[3, 6]]
