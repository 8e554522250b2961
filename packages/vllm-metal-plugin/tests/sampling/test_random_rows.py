import mlx.core as mx
import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from vllm_metal_plugin.sampling import Sampler, SamplingState

DRAWS = 2000


def oracle(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities by vLLM's own functions, in float64."""
    logits = torch.tensor(row, dtype=torch.float64)[None] / params.temperature
    if params.min_p:
        probabilities = logits.softmax(-1)
        logits[probabilities < params.min_p * probabilities.max()] = -float("inf")
    k = torch.tensor([params.top_k if params.top_k > 0 else len(row)])
    p = torch.tensor([params.top_p], dtype=torch.float64)
    return apply_top_k_top_p_pytorch(logits, k, p).softmax(-1)[0].numpy()


def draws(row: np.ndarray, options: dict, per_batch: int = 40) -> np.ndarray:
    batches = DRAWS // per_batch
    state = SamplingState(per_batch, len(row), seed=1)
    for i in range(per_batch):
        state.add(i, str(i), SamplingParams(seed=i, **options), [], [])
    sampler, logits = Sampler(len(row)), mx.array(np.tile(row, (per_batch, 1)))
    return np.concatenate([np.array(sampler(logits, range(per_batch), state).token_ids) for _ in range(batches)])


def chi_square_is_plausible(tokens: np.ndarray, probabilities: np.ndarray) -> bool:
    """Tokens expected fewer than 8 times are pooled; the limit is 4 standard deviations."""
    counts = np.bincount(tokens, minlength=len(probabilities)).astype(float)
    expected = probabilities * len(tokens)
    large = expected >= 8
    counts = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    freedom = max(used.sum() - 1, 1)
    return bool(statistic < freedom + 4 * np.sqrt(2 * freedom) + 4)


OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 10},
    {"temperature": 1.3, "top_k": 200},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "top_p": 0.8},
    {"temperature": 2.0, "top_p": 0.3},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.7, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.9, "min_p": 0.001},
]


@pytest.mark.parametrize("spread", [1.0, 2.5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_follow_the_distribution_of_vllm(options, spread):
    row = (np.random.default_rng(3).normal(size=1500) * spread).astype(np.float32)
    probabilities = oracle(row, SamplingParams(**options))
    tokens = draws(row, options)
    assert (probabilities[tokens] > 0).all()
    assert chi_square_is_plausible(tokens, probabilities)


@pytest.mark.parametrize("vocab", [1003, 4096])
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0, 6.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95])
def test_no_token_outside_the_nucleus_and_no_part_of_it_missing(vocab, spread, top_p):
    row = (np.random.default_rng(5).normal(size=vocab) * spread).astype(np.float32)
    options = {"temperature": 1.0, "top_p": top_p}
    probabilities = oracle(row, SamplingParams(**options))
    if spread == 0.0:
        probabilities = np.full(vocab, 1 / vocab)  # all tokens are equal, and equal tokens stay together
    tokens = draws(row, options)
    assert (probabilities[tokens] > 0).mean() > 0.999  # the edge token may differ by rounding
    order = np.argsort(-probabilities)
    place = np.cumsum(probabilities[order])[np.argsort(order)][tokens]
    assert abs(place.mean() - 0.5) < 0.05 + probabilities.max()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_processed_logits_are_those_of_vllm(options):
    rows = (np.random.default_rng(9).normal(size=(3, 1500)) * 2.5).astype(np.float32)
    state = SamplingState(3, 1500)
    params = SamplingParams(logprobs=-1, seed=2, **options)
    for row in range(3):
        state.add(row, str(row), params, [], [])
    out = Sampler(1500, "processed_logprobs")(mx.array(rows), range(3), state)
    lists = out.logprobs.to_lists(range(3), 3)
    for row in range(3):
        got = np.full(1500, np.nan)
        one = lists.slice_request(row, 1)
        got[one.logprob_token_ids[0, 1:]] = one.logprobs[0, 1:]
        with np.errstate(divide="ignore"):
            expected = np.log(oracle(rows[row], params))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_vocabularies_smaller_than_the_window():
    row = np.array([1.0, 2.0, 0.0, -1.0], np.float32)
    options = {"temperature": 1.0, "top_k": 3, "top_p": 0.9}
    probabilities = oracle(row, SamplingParams(**options))
    assert chi_square_is_plausible(draws(row, options), probabilities)
