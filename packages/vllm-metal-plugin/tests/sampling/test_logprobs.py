import mlx.core as mx
import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.sampler import Sampler as TorchSampler

from vllm_metal_plugin.sampling import PromptLogprobs, Sampler, SamplingState

VOCAB = 2000


def normal(rows: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, VOCAB)) * 3).astype(np.float32)


def run(logits: np.ndarray, requests: list[dict], mode: str = "raw_logprobs"):
    state = SamplingState(len(requests), VOCAB)
    for row, options in enumerate(requests):
        state.add(row, str(row), SamplingParams(**options), [1], [])
    out = Sampler(VOCAB, mode)(mx.array(logits), range(len(requests)), state)
    return out.token_ids.tolist(), out.logprobs


@pytest.mark.parametrize("k", [0, 1, 5, 20, 900])
def test_raw_logprobs_equal_those_of_vllm(k):
    logits = normal(3)
    tokens, logprobs = run(logits, [{"temperature": 1.0, "seed": row, "logprobs": k} for row in range(3)])
    lists = logprobs.to_lists(range(3), 3)
    scores = TorchSampler.compute_logprobs(torch.from_numpy(logits))
    values, ids = scores.topk(k, dim=-1)
    taken = scores.gather(1, torch.tensor(tokens)[:, None])
    assert lists.logprob_token_ids.tolist() == np.column_stack([tokens, ids.numpy()]).tolist()
    np.testing.assert_allclose(lists.logprobs, torch.cat([taken, values], dim=1), atol=1e-5)
    assert lists.sampled_token_ranks.tolist() == (scores >= taken).sum(-1).tolist()
    assert lists.logprob_token_ids.dtype == np.int32
    assert lists.logprobs.dtype == np.float32
    assert lists.cu_num_generated_tokens == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits", "raw_logprobs", "processed_logprobs"])
def test_modes(mode):
    logits = normal(2)
    requests = [
        {"temperature": 0.0, "logit_bias": {7: 50.0}, "logprobs": 2},
        {"temperature": 0.5, "top_k": 3, "logit_bias": {7: 2.0}, "logprobs": 4},
    ]
    _, logprobs = run(logits, requests, mode)
    lists = logprobs.to_lists([0, 1], 2)
    expected = logits.astype(np.float64)
    if mode.startswith("processed"):
        expected[0, 7] += 50
        expected[1, 7] += 2
        expected[1] /= 0.5
        expected[1, expected[1] < np.sort(expected[1])[-3]] = -np.inf
    if mode.endswith("logprobs"):
        expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    for row, columns in ((0, 3), (1, 5)):
        ids = lists.logprob_token_ids[row, :columns]
        np.testing.assert_allclose(lists.logprobs[row, :columns], expected[row, ids], rtol=1e-5, atol=1e-5)


def test_each_row_gets_what_it_asked_for_at_its_place_in_the_output():
    logits = normal(4)
    requests = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.0},
        {"temperature": 0.0, "logprob_token_ids": [5, 9, 3]},
        {"temperature": 0.0, "logprobs": 1},
    ]
    tokens, logprobs = run(logits, requests)
    lists = logprobs.to_lists([6, 1, 0, 3], 7)
    scores = TorchSampler.compute_logprobs(torch.from_numpy(logits)).numpy()
    third = lists.slice_request(0, 1)
    assert third.logprob_token_ids[0, :4].tolist() == [tokens[2], 5, 9, 3]
    np.testing.assert_allclose(third.logprobs[0, :4], scores[2, [tokens[2], 5, 9, 3]], atol=1e-5)
    first = lists.slice_request(6, 1)
    assert first.logprob_token_ids[0, :3].tolist() == [tokens[0], *np.argsort(-logits[0])[:2]]
    assert np.isneginf(first.logprobs[0, 3:]).all()
    assert lists.slice_request(3, 1).logprob_token_ids[0, 0] == tokens[3]
    assert len(lists.slice_request(1, 0).logprobs) == 0
    assert lists.cu_num_generated_tokens == [0, 1, 1, 1, 2, 2, 2, 3]


def test_minus_one_is_the_whole_vocabulary():
    logits = normal(1)
    _, logprobs = run(logits, [{"temperature": 0.0, "logprobs": -1}])
    lists = logprobs.to_lists([0], 1)
    assert sorted(lists.logprob_token_ids[0, 1:].tolist()) == list(range(VOCAB))


def test_nobody_asked():
    assert run(normal(1), [{"temperature": 0.0}])[1] is None


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
@pytest.mark.parametrize("k", [0, 3, -1])
def test_prompt_logprobs_collect_chunks(mode, k):
    prompt = [4, 8, 15, 16, 23, 42]
    logits = normal(5, seed=2)
    prompt_logprobs = PromptLogprobs(len(prompt), k, VOCAB, mode)
    prompt_logprobs.add(0, mx.array(logits[:3]), prompt[1:4])
    prompt_logprobs.add(3, mx.array(logits[3:]), prompt[4:])
    mx.eval(prompt_logprobs.arrays())
    tensors = prompt_logprobs.to_tensors()
    scores = torch.from_numpy(logits)
    if mode.endswith("logprobs"):
        scores = TorchSampler.compute_logprobs(scores)
    targets = torch.tensor(prompt[1:])[:, None]
    count = VOCAB if k == -1 else k
    expected = torch.cat([scores.gather(1, targets), scores.topk(count, dim=-1).values], dim=1)
    torch.testing.assert_close(tensors.logprobs, expected, atol=1e-5, rtol=1e-5)
    assert tensors.logprob_token_ids.dtype == torch.int32
    assert tensors.logprob_token_ids[:, 0].tolist() == prompt[1:]
    assert tensors.selected_token_ranks.tolist() == (scores >= scores.gather(1, targets)).sum(-1).tolist()


def test_a_prompt_of_one_token_has_no_logprobs():
    assert PromptLogprobs(1, 2, VOCAB, "raw_logprobs").to_tensors().logprobs.shape == (0, 3)
