"""The runner fed with hand-written scheduler outputs, over the tiny model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

import metal_models
from metal_kv import CacheGroup, CacheLayout, KVCachePool
from vllm_metal_plugin.forward_pass import PagedForward
from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.model_runner import ModelRunner
from vllm_metal_plugin.sampling import PromptLogprobs, Sampler, SamplingState

BLOCK = 8
GREEDY = SamplingParams(temperature=0.0)
Generate = Callable[[Sequence[int], int], list[int]]
Step = Callable[..., SchedulerOutput]


@pytest.fixture
def runner(model_dir: Path) -> ModelRunner:
    model = metal_models.load(model_dir)
    specs = model.kv_cache_specs(BLOCK)
    pool = KVCachePool(CacheLayout.from_groups([CacheGroup(tuple(specs), next(iter(specs.values())))], 32))
    vocab_size = model.vocab_size
    batch = InputBatch(
        max_reqs=4,
        max_blocks=[16],
        sampling=SamplingState(4, vocab_size),
        new_prompt_logprobs=lambda length, k: PromptLogprobs(length, k, vocab_size, "raw_logprobs"),
    )
    return ModelRunner(
        PagedForward(model, pool),
        batch,
        Sampler(vocab_size),
        block_sizes=[BLOCK],
        wait_before_dispatch=True,
        debug=True,
    )


def new(req_id: str, prompt: Sequence[int], first_block: int, params: SamplingParams = GREEDY) -> NewRequestData:
    return NewRequestData(
        req_id=req_id,
        prompt_token_ids=list(prompt),
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=([*range(first_block, first_block + 5)],),
        num_computed_tokens=0,
        lora_request=None,
    )


def start(runner: ModelRunner, output: SchedulerOutput, grammar: GrammarOutput | None = None) -> Any:
    assert runner.execute_model(output) is None
    return runner.sample_tokens(grammar)


def tokens(result: Any) -> dict[str, list[int]]:
    output = result.get_output() if isinstance(result, AsyncModelRunnerOutput) else result
    return {req_id: output.sampled_token_ids[i] for req_id, i in output.req_id_to_index.items()}


def test_steps_dispatched_before_earlier_ones_are_read(
    runner: ModelRunner, step: Step, mlx_lm_tokens: Generate
) -> None:
    prompt = [1, 5, 9, 17]
    results = [start(runner, step({"a": 4}, [new("a", prompt, 1)]))]
    for i in range(5):
        results.append(start(runner, step({"a": 1}, computed={"a": 4 + i})))
    assert [tokens(result)["a"][0] for result in results] == mlx_lm_tokens(prompt, 6)


def test_mixed_step_and_partial_prefill(runner: ModelRunner, step: Step, mlx_lm_tokens: Generate) -> None:
    long = [1, *range(20, 40)]
    first = start(runner, step({"a": 3}, [new("a", [1, 33, 44], 1)]))
    second = start(runner, step({"b": 10, "a": 1}, [new("b", long, 6)], {"a": 3}))
    third = start(runner, step({"a": 1, "b": 11}, computed={"a": 4, "b": 10}))
    assert tokens(second)["b"] == []
    got = [tokens(first)["a"], tokens(second)["a"], tokens(third)["a"]]
    assert [token for [token] in got] == mlx_lm_tokens([1, 33, 44], 3)
    assert tokens(third)["b"] == mlx_lm_tokens(long, 1)


def test_step_without_tokens_is_the_empty_output(runner: ModelRunner, step: Step) -> None:
    tokens(start(runner, step({"a": 2}, [new("a", [1, 7], 1)])))
    assert runner.execute_model(step({}, finished=["a"])) is EMPTY_MODEL_RUNNER_OUTPUT
    assert runner.sample_tokens(None) is EMPTY_MODEL_RUNNER_OUTPUT


def test_request_finished_while_its_next_step_runs(runner: ModelRunner, step: Step, mlx_lm_tokens: Generate) -> None:
    start(runner, step({"a": 2}, [new("a", [1, 7], 1)]))
    late = start(runner, step({"a": 1}, computed={"a": 2}))
    after = start(runner, step({"b": 3}, [new("b", [1, 33, 44], 6)], finished=["a"]))
    assert tokens(after) == {"b": mlx_lm_tokens([1, 33, 44], 1)}
    assert len(tokens(late)["a"]) == 1


def test_blocks_are_copied_before_the_forward(runner: ModelRunner, step: Step, mlx_lm_tokens: Generate) -> None:
    prompt = [1, *range(20, 30)]
    tokens(start(runner, step({"a": 11}, [new("a", prompt, 1)])))
    hit = new("b", prompt, 10)
    hit.block_ids = ([1, 10, 11, 12, 13],)
    hit.num_computed_tokens = 10
    output = step({"b": 1}, [hit])
    output.kv_cache_block_copies = [KVCacheBlockCopy(2, 10)]
    assert tokens(start(runner, output)) == {"b": mlx_lm_tokens(prompt, 1)}


def test_bitmask_rows_follow_their_own_order(runner: ModelRunner, step: Step) -> None:
    def only(token: int) -> np.ndarray:
        bits = np.zeros(160, bool)
        bits[token] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    arriving = [new(req_id, [1, 7 + i], 1 + 6 * i) for i, req_id in enumerate("abc")]
    grammar = GrammarOutput(["c", "a"], np.stack([only(130), only(11)]))
    got = tokens(start(runner, step({"a": 2, "b": 2, "c": 2}, arriving), grammar))
    assert got["c"] == [130]
    assert got["a"] == [11]
    assert len(got["b"]) == 1


def test_prompt_logprobs_come_with_the_last_chunk(runner: ModelRunner, step: Step, mlx_lm_logprobs: Any) -> None:
    prompt = [1, *range(50, 62)]
    params = SamplingParams(temperature=0.0, prompt_logprobs=2)
    first = start(runner, step({"a": 5}, [new("a", prompt, 1, params)])).get_output()
    second = start(runner, step({"a": 8}, computed={"a": 5})).get_output()
    assert first.prompt_logprobs_dict == {}
    scores = second.prompt_logprobs_dict["a"]
    assert scores.logprob_token_ids[:, 0].tolist() == prompt[1:]
    expected = mlx_lm_logprobs(prompt)[np.arange(12), prompt[1:]]
    np.testing.assert_allclose(scores.logprobs[:, 0].numpy(), expected, atol=1e-3)
    third = start(runner, step({"a": 1}, computed={"a": 13})).get_output()
    assert third.prompt_logprobs_dict == {}
