"""vLLM's own engine, in process, over the tiny model: tokens must be mlx-lm's."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

PROMPTS = [[1, 5, 9, 17], [1, *range(10, 80)], [1, 33, 44], [1, *[7, 8, 9] * 9], [1]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
Generate = Callable[[Sequence[int], int], list[int]]


@pytest.fixture
def engine(make_engine: Callable[..., LLM], model_dir: Path) -> Callable[..., LLM]:
    """Engines over the tiny llama."""
    return partial(
        make_engine,
        model_dir,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        kv_cache_memory_bytes=4 << 20,
    )


def generate(llm: LLM, prompts: Sequence[Sequence[int]], params: Any = GREEDY) -> list[list[int]]:
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(inputs, params, use_tqdm=False)]


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_mixed_batches_equal_mlx_lm(
    engine: Callable[..., LLM], mlx_lm_tokens: Generate, async_scheduling: bool
) -> None:
    llm = engine(async_scheduling=async_scheduling)
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == async_scheduling
    assert generate(llm, PROMPTS) == [mlx_lm_tokens(prompt, 20) for prompt in PROMPTS]


def test_prefix_hits_and_small_chunks_equal_mlx_lm(engine: Callable[..., LLM], mlx_lm_tokens: Generate) -> None:
    llm = engine(max_num_batched_tokens=9, max_num_seqs=4, block_size=8)
    shared = [1, *range(30, 70)]
    prompts = [[*shared, 100 + i] for i in range(3)]
    expected = [mlx_lm_tokens(prompt, 20) for prompt in prompts]
    assert generate(llm, prompts[:1]) == expected[:1]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in outputs] == expected
    assert min(out.num_cached_tokens for out in outputs) >= 40


def test_preempted_requests_resume(engine: Callable[..., LLM], mlx_lm_tokens: Generate) -> None:
    llm = engine(num_gpu_blocks_override=12, block_size=8, max_model_len=64, enable_prefix_caching=False)
    prompts = [[1, *range(10 + i, 26 + i)] for i in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    preemptions = _count_preemptions(llm)
    assert generate(llm, prompts, params) == [mlx_lm_tokens(prompt, 30) for prompt in prompts]
    assert preemptions()


def _count_preemptions(llm: LLM) -> Callable[[], int]:
    """How many preemptions the scheduler has reported since now."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, seen = scheduler.schedule, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        seen.extend(output.preempted_req_ids or ())
        return output

    scheduler.schedule = counting
    return lambda: len(seen)


def test_seeded_sampling_does_not_depend_on_the_batch(engine: Callable[..., LLM]) -> None:
    llm = engine()
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=12, ignore_eos=True)
    alone = generate(llm, PROMPTS[:1], params)
    together = generate(llm, PROMPTS, params)
    assert together[:1] == alone
    assert generate(llm, PROMPTS[:1], SamplingParams(**_as(params, seed=8))) != alone


def _as(params: SamplingParams, **changes: Any) -> dict[str, Any]:
    return {name: getattr(params, name) for name in ("temperature", "top_p", "max_tokens", "ignore_eos")} | changes


def test_several_samples_of_one_prompt(engine: Callable[..., LLM]) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True)
    [output] = engine().generate([{"prompt_token_ids": [1, 5, 9]}], params, use_tqdm=False)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3


def test_logprobs_of_prompt_and_output(engine: Callable[..., LLM], mlx_lm_logprobs: Any) -> None:
    llm = engine(max_num_batched_tokens=9, max_num_seqs=4)
    prompt = [1, *range(40, 70)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    plain = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    [output, _] = llm.generate(
        [{"prompt_token_ids": prompt}, {"prompt_token_ids": [1, 7]}], [params, plain], use_tqdm=False
    )
    tokens = list(output.outputs[0].token_ids)
    expected = mlx_lm_logprobs([*prompt, *tokens])
    assert output.prompt_logprobs[0] is None
    for position, scores in enumerate(output.prompt_logprobs[1:], 1):
        assert scores[prompt[position]].logprob == pytest.approx(expected[position - 1, prompt[position]], abs=1e-3)
    for i, scores in enumerate(output.outputs[0].logprobs):
        assert scores[tokens[i]].rank == 1
        assert len(scores) == 2
        for token, score in scores.items():
            assert score.logprob == pytest.approx(expected[len(prompt) - 1 + i, token], abs=1e-3)


def test_structured_output(engine: Callable[..., LLM]) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    choices = ["w3", "w4"]
    params = SamplingParams(temperature=0.0, max_tokens=4, structured_outputs=StructuredOutputsParams(choice=choices))
    llm = engine()
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:3]]
    first, free, last = llm.generate(inputs, [params, GREEDY, params], use_tqdm=False)
    assert first.outputs[0].text.strip() in choices
    assert last.outputs[0].text.strip() in choices
    assert len(free.outputs[0].token_ids) == 20


def test_abort_while_a_step_is_in_flight(engine: Callable[..., LLM], mlx_lm_tokens: Generate) -> None:
    llm = engine()
    core = llm.llm_engine
    core.add_request("gone", {"prompt_token_ids": [1, 5, 9]}, GREEDY)
    core.add_request("stays", {"prompt_token_ids": [1, 33, 44]}, GREEDY)
    for _ in range(3):
        core.step()
    core.abort_request(["gone"])
    finished = {}
    while core.has_unfinished_requests():
        finished |= {out.request_id: out for out in core.step() if out.finished}
    assert list(finished["stays"].outputs[0].token_ids) == mlx_lm_tokens([1, 33, 44], 20)


def test_failing_step_ends_its_requests_and_not_the_engine(
    engine: Callable[..., LLM], mlx_lm_tokens: Generate
) -> None:
    llm = engine()
    core = llm.llm_engine
    worker = core.engine_core.engine_core.model_executor.driver_worker.worker
    compute_logits = worker.model.compute_logits

    def out_of_memory(hidden: Any) -> Any:
        worker.model.compute_logits = compute_logits
        raise RuntimeError("[metal::malloc] Attempting to allocate too much")

    worker.model.compute_logits = out_of_memory
    [failed] = llm.generate([{"prompt_token_ids": PROMPTS[0]}], GREEDY, use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error"
    assert generate(llm, PROMPTS) == [mlx_lm_tokens(prompt, 20) for prompt in PROMPTS]


def test_unsupported_request_is_a_value_error(engine: Callable[..., LLM]) -> None:
    llm = engine()
    with pytest.raises(ValueError, match="knob"):
        generate(llm, PROMPTS[:1], SamplingParams(extra_args={"knob": 1}))
    assert len(generate(llm, PROMPTS[:1])[0]) == 20


def test_longest_length_that_fits(engine: Callable[..., LLM]) -> None:
    llm = engine(max_model_len=-1, kv_cache_memory_bytes=80 * 2 * 2 * 2 * 16 * 4)
    assert 32 <= llm.llm_engine.vllm_config.model_config.max_model_len < 80


def test_cache_too_small_for_one_request_is_refused_with_what_fits(engine: Callable[..., LLM]) -> None:
    with pytest.raises(ValueError, match=r"\(--kv-cache-memory-bytes\); reduce --max-model-len to \d+ or less"):
        engine(kv_cache_memory_bytes=80 * 2 * 2 * 2 * 16 * 4)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "int8_per_token_head"},
        {"additional_config": {"kv_cache_dtype": {"key": "int8", "value": "int4"}}},
    ],
)
def test_quantised_cache_with_prefix_hits(
    engine: Callable[..., LLM], mlx_lm_logprobs: Any, options: dict[str, Any]
) -> None:
    """Greedy tokens of a quantised cache are nearly the best ones, and hits give what the first computation gave."""
    llm = engine(block_size=8, **options)
    prompt = [1, *range(30, 70)]
    [first] = generate(llm, [prompt])
    [again] = llm.generate([{"prompt_token_ids": prompt}], GREEDY, use_tqdm=False)
    assert again.num_cached_tokens == 40
    assert list(again.outputs[0].token_ids) == first
    logprobs = mlx_lm_logprobs([*prompt, *first])[len(prompt) - 1 : -1]
    shortfall = logprobs.max(axis=-1) - logprobs[range(20), first]
    assert shortfall.mean() < 0.2


def test_quantised_cache_holds_more(engine: Callable[..., LLM]) -> None:
    def blocks(**options: Any) -> int:
        return int(engine(**options).llm_engine.vllm_config.cache_config.num_gpu_blocks)

    plain = blocks()
    assert blocks(kv_cache_dtype="int8_per_token_head") > 2.5 * plain


@pytest.fixture
def contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve from mlx-lm's own caches."""
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")


@pytest.mark.usefixtures("contiguous")
def test_contiguous_batches_equal_mlx_lm(engine: Callable[..., LLM], mlx_lm_tokens: Generate) -> None:
    llm = engine()
    expected = [mlx_lm_tokens(prompt, 20) for prompt in PROMPTS]
    assert generate(llm, PROMPTS) == expected
    assert generate(llm, PROMPTS) == expected


@pytest.mark.usefixtures("contiguous")
def test_contiguous_prefixes_preemptions_and_prompt_logprobs(
    engine: Callable[..., LLM], mlx_lm_tokens: Generate, mlx_lm_logprobs: Any
) -> None:
    llm = engine(num_gpu_blocks_override=12, block_size=8, max_model_len=64)
    shared = [1, *range(10, 26)]
    prompts = [[*shared, 30 + i] for i in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    preemptions = _count_preemptions(llm)
    assert generate(llm, prompts, params) == [mlx_lm_tokens(prompt, 30) for prompt in prompts]
    assert preemptions()
    asking = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    [output] = llm.generate([{"prompt_token_ids": prompts[0]}], asking, use_tqdm=False)
    expected = mlx_lm_logprobs(prompts[0])
    for position, scores in enumerate(output.prompt_logprobs[1:], 1):
        token = prompts[0][position]
        assert scores[token].logprob == pytest.approx(expected[position - 1, token], abs=1e-3)


@pytest.mark.usefixtures("contiguous")
def test_contiguous_prefixes_are_shared_under_one_salt(engine: Callable[..., LLM], mlx_lm_tokens: Generate) -> None:
    llm = engine()
    prompt = [1, *range(30, 90)]
    expected = mlx_lm_tokens(prompt, 20)
    for salt in ("a", "b", "a"):
        [output] = llm.generate([{"prompt_token_ids": prompt, "cache_salt": salt}], GREEDY, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == expected
    assert generate(llm, [prompt]) == [expected]
