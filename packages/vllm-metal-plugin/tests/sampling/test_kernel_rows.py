"""What the sampling kernels are given; here their twins compute it."""

import mlx.core as mx
import numpy as np
import pytest
from vllm import SamplingParams

from vllm_metal_plugin.sampling import GrammarRows, Sampler, SamplingState
from vllm_metal_plugin.sampling.kernel_rows import KernelRows
from vllm_metal_plugin.sampling.step_plan import StepPlan

VOCAB = 100


def batch(*params):
    state = SamplingState(len(params), VOCAB, seed=0)
    for row, of_row in enumerate(params):
        state.add(row, str(row), of_row, [1, 2, 3], [3, 4, 4])
    return state, StepPlan.build(state, range(len(params)))


def random_logits(rows, dtype=mx.float32):
    return mx.array(np.random.default_rng(0).normal(size=(rows, VOCAB)).astype(np.float32) * 3).astype(dtype)


def test_each_token_takes_the_next_number_of_its_request():
    state, plan = batch(SamplingParams(temperature=1.0, seed=5), SamplingParams(temperature=0.0))
    logits, kernels = mx.zeros((2, VOCAB)), KernelRows()
    for emitted in (3, 4, 5, 50, 51, 80, 3):
        token, greedy = kernels.sample(logits, plan, np.array([emitted, emitted], np.int32)).tolist()
        assert token == int(state.at(0).uniform(emitted)[0] * VOCAB)
        assert greedy == 0


def test_rules_reach_their_rows():
    params = (
        SamplingParams(temperature=0.5, top_k=1),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=2.0, min_p=0.99),
        SamplingParams(temperature=2.0, top_p=1e-6),
    )
    _, plan = batch(*params)
    logits = random_logits(4)
    tokens = KernelRows().sample(logits, plan, np.zeros(4, np.int32))
    assert tokens.tolist() == mx.argmax(logits, axis=1).tolist()


def test_another_plan_has_its_own_rules():
    kernels, logits = KernelRows(), random_logits(1)
    for params in (SamplingParams(temperature=2.0, seed=1), SamplingParams(temperature=0.0)):
        _, plan = batch(params)
        token = kernels.sample(logits, plan, np.zeros(1, np.int32)).item()
    assert token == mx.argmax(logits).item()


@pytest.mark.parametrize("grammar_rows", [None, [0, 1, 2], [2]], ids=str)
@pytest.mark.parametrize("penalised", [False, True])
def test_adjusts_as_the_sampler_does(grammar_rows, penalised):
    if grammar_rows is None and not penalised:
        return
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25} if penalised else {}
    params = [SamplingParams(temperature=0.0, logprobs=VOCAB, **penalties), SamplingParams(temperature=0.0)]
    params.append(SamplingParams(temperature=0.0, logprobs=VOCAB, **penalties))
    state, plan = batch(*params)
    grammar = None
    if grammar_rows is not None:
        bits = np.random.default_rng(1).integers(-(2**31), 2**31, (len(grammar_rows), 4)).astype(np.int32)
        grammar = GrammarRows(np.array(grammar_rows, np.int32), bits)
    logits = random_logits(3, mx.bfloat16)
    found = np.array(KernelRows().adjust(logits, grammar, plan.penalties, state))
    out = Sampler(VOCAB, "processed_logits")(logits, [0, 1, 2], state, grammar)
    assert out.logprobs is not None
    columns = out.logprobs.columns
    for place, row in enumerate(out.logprobs.rows):
        want = np.zeros(VOCAB, np.float32)
        want[np.array(columns.token_ids)[place, 1:]] = np.array(columns.logprobs)[place, 1:]
        np.testing.assert_allclose(found[row], want, rtol=1e-5, atol=1e-5)
