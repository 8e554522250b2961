"""Drafts through vLLM's engine change how many steps a request takes, not its tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

PROMPTS = [[1, 5, 9, 17, 5, 9], [1, *range(10, 80)], [1, 33, 44, 33], [1, *[7, 8, 9] * 9], [1]]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
Generate = Callable[[Sequence[int], int], list[int]]


@pytest.fixture
def engine(make_engine: Callable[..., LLM], model_dir: Path) -> Callable[..., LLM]:
    """Engines over the tiny llama."""
    return partial(
        make_engine,
        model_dir,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=4 << 20,
        disable_log_stats=False,
    )


def generate(llm: LLM, params: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Any]:
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [out.outputs[0] for out in llm.generate(inputs, params, use_tqdm=False)]


def kept(llm: LLM) -> tuple[float, float]:
    """Return how many tokens were drafted, and how many of them were kept."""
    return counted(llm, "spec_decode_num_draft_tokens"), counted(llm, "spec_decode_num_accepted_tokens")


def counted(llm: LLM, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def test_greedy_tokens_are_those_of_mlx_lm(engine: Callable[..., LLM], mlx_lm_tokens: Generate) -> None:
    llm = engine(speculative_config=dict(DRAFTS))
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    got = [list(out.token_ids) for out in generate(llm, params)]
    assert got == [mlx_lm_tokens(prompt, 48) for prompt in PROMPTS]
    drafted, accepted = kept(llm)
    assert drafted > accepted > 0


def test_every_kind_of_request_gets_what_it_gets_without_drafts(engine: Callable[..., LLM]) -> None:
    common = {"max_tokens": 24, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0.9, seed=3, repetition_penalty=1.2, logprobs=2, **common),
        SamplingParams(temperature=0.7, seed=4, top_k=5, top_p=0.9, **common),
        SamplingParams(temperature=0.0, logprobs=0, presence_penalty=1.0, **common),
        SamplingParams(temperature=0.0, bad_words=["w8 w9"], prompt_logprobs=1, **common),
        SamplingParams(temperature=0.0, max_tokens=6, structured_outputs=StructuredOutputsParams(choice=["w7 w8 w7"])),
    ]
    results = []
    for options in ({}, {"speculative_config": dict(DRAFTS)}):
        outs = generate(engine(**options), params)
        results.append(
            [(list(out.token_ids), [sorted(place) for place in out.logprobs or ()], out.finish_reason) for out in outs]
        )
    assert results[0] == results[1]


def test_preempted_requests_resume(engine: Callable[..., LLM], mlx_lm_tokens: Generate) -> None:
    llm = engine(
        speculative_config=dict(DRAFTS),
        num_gpu_blocks_override=12,
        block_size=8,
        max_model_len=64,
        enable_prefix_caching=False,
    )
    prompts = [[1, *range(10 + i, 26 + i)] for i in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    got = [list(out.token_ids) for out in generate(llm, params, prompts)]
    assert got == [mlx_lm_tokens(prompt, 30) for prompt in prompts]
    assert counted(llm, "num_preemptions") > 0


def test_a_request_fills_the_context(engine: Callable[..., LLM], mlx_lm_tokens: Generate) -> None:
    llm = engine(speculative_config=dict(DRAFTS), max_model_len=40)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    [out] = generate(llm, params, [[1, *[7, 8, 9] * 9]])
    assert list(out.token_ids) == mlx_lm_tokens([1, *[7, 8, 9] * 9], 12)
