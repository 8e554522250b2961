import mlx.core as mx
import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput

from vllm_metal_plugin.errors import VllmMetalPluginError
from vllm_metal_plugin.sampling import GrammarRows, Sampler, SamplingState
from vllm_metal_plugin.sampling.structured_output import additive_mask, apply_grammar, pack_bits


def bits_of(allowed: list[int], words: int) -> np.ndarray:
    row = np.zeros(words, dtype=np.uint32)
    for token in allowed:
        row[token // 32] |= np.uint32(1 << (token % 32))
    return row.view(np.int32)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 70, 100, 128, 129])
@pytest.mark.parametrize("words", [1, 3, 5])
def test_bits_are_read_least_significant_first_and_missing_ones_forbid(vocab, words):
    rng = np.random.default_rng(vocab * words)
    bitmask = rng.integers(-(2**31), 2**31, size=(2, words)).astype(np.int32)
    expected = np.full((2, vocab), -np.inf)
    for row in range(2):
        for token in range(min(vocab, words * 32)):
            if int(bitmask[row, token // 32]) >> (token % 32) & 1:
                expected[row, token] = 0
    assert np.array_equal(np.array(additive_mask(bitmask, vocab)), expected)


def test_packing_is_the_inverse():
    allowed = np.random.default_rng(0).random((3, 77)) < 0.5
    assert np.array_equal(np.array(additive_mask(pack_bits(allowed), 77)) == 0, allowed)


def test_only_the_constrained_rows_change():
    logits = mx.array(np.arange(200, dtype=np.float32).reshape(4, 50))
    grammar = GrammarRows(np.array([2, 0], np.int32), np.stack([bits_of([7], 2), bits_of([3, 40], 2)]))
    masked = np.array(apply_grammar(logits, grammar))
    assert np.flatnonzero(np.isfinite(masked[2])).tolist() == [7]
    assert np.flatnonzero(np.isfinite(masked[0])).tolist() == [3, 40]
    assert np.array_equal(masked[[1, 3]], np.array(logits)[[1, 3]])


def output(req_ids: list[str], rows: int) -> GrammarOutput:
    bitmask = np.arange(rows, dtype=np.int32)[:, None]
    return GrammarOutput(req_ids, bitmask, [0] * len(req_ids))


def test_rows_are_matched_by_request():
    grammar = GrammarRows.from_vllm(output(["c", "a", "gone"], 3), {"a": 0, "b": 1, "c": 2})
    assert grammar.rows.tolist() == [2, 0]
    assert grammar.bitmask[:, 0].tolist() == [0, 1]
    assert GrammarRows.from_vllm(output(["gone"], 1), {"a": 0}) is None


def test_draft_rows_packed_and_strided():
    rows, drafts = {"a": 0, "b": 3}, {"a": 2}
    packed = GrammarRows.from_vllm(output(["b", "a"], 4), rows, drafts)
    assert packed.rows.tolist() == [3, 0, 1, 2]
    assert packed.bitmask[:, 0].tolist() == [0, 1, 2, 3]
    strided = GrammarRows.from_vllm(output(["b", "a"], 6), rows, drafts)
    assert strided.rows.tolist() == [3, 0, 1, 2]
    assert strided.bitmask[:, 0].tolist() == [0, 3, 4, 5]
    with pytest.raises(VllmMetalPluginError, match="from_vllm"):
        GrammarRows.from_vllm(output(["b", "a"], 5), rows, drafts)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.5}])
def test_sampled_tokens_are_allowed_ones(options):
    vocab, allowed = 333, [2, 64, 300]
    state = SamplingState(2, vocab)
    for row in range(2):
        state.add(row, str(row), SamplingParams(**options), [1], [])
    grammar = GrammarRows(np.array([0, 1], np.int32), np.stack([bits_of(allowed, 10)] * 2))
    sampler = Sampler(vocab)
    for seed in range(10):
        logits = np.random.default_rng(seed).normal(size=(2, vocab)).astype(np.float32)
        assert set(sampler(mx.array(logits), [0, 1], state, grammar).token_ids.tolist()) <= set(allowed)


def test_raw_logprobs_see_the_grammar():
    state = SamplingState(1, 64)
    state.add(0, "a", SamplingParams(temperature=0.0, logprobs=2), [1], [])
    grammar = GrammarRows(np.array([0], np.int32), bits_of([5], 2)[None])
    out = Sampler(64)(mx.zeros((1, 64)), [0], state, grammar)
    assert out.logprobs.to_lists([0], 1).logprobs[0, 0] == pytest.approx(0.0, abs=1e-6)
