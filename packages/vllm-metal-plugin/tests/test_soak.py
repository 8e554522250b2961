"""Many random requests through vLLM's engine: memory stays flat, and nobody reads another's rows."""

import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest
from vllm import LLM, SamplingParams

Generate = Callable[[Sequence[int], int], list[int]]
PATHS = {"paged": {}, "contiguous": {"VLLM_METAL_USE_PAGED_ATTENTION": "0"}}


@pytest.fixture
def llm(model_dir: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """A small engine in this process: few blocks, small steps, so that requests wait, are preempted and evicted."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    for name, value in PATHS[request.param].items():
        monkeypatch.setenv(name, value)
    engine = LLM(
        model=str(model_dir),
        max_model_len=96,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=8,
        num_gpu_blocks_override=40,
        kv_cache_memory_bytes=4 << 20,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()
    gc.collect()


class Traffic:
    """Prompts that share beginnings, of which each one's answer is known."""

    def __init__(self, mlx_lm_tokens: Generate, seed: int) -> None:
        self.random = random.Random(seed)
        self.answers: dict[tuple[int, ...], list[int]] = {}
        bases = [[1, *(self.random.randrange(3, 160) for _ in range(n))] for n in (7, 24, 41)]
        for _ in range(24):
            base = self.random.choice(bases)
            shared = base[: self.random.choice([1, 8, 16, 17, len(base)])]
            # One other token, then the same again: rows of a neighbour would be almost right.
            prompt = (*shared, self.random.randrange(3, 160), *base[len(shared) + 1 :][: self.random.randrange(9)])
            self.answers[prompt] = mlx_lm_tokens(prompt, 24)

    def __call__(self, llm: LLM, num_requests: int) -> None:
        prompts = self.random.choices(list(self.answers), k=num_requests)
        lengths = [self.random.randint(1, 24) for _ in prompts]
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
        inputs = [
            {"prompt_token_ids": list(prompt)} | self.random.choice([{}, {"cache_salt": "a"}, {"cache_salt": "b"}])
            for prompt in prompts
        ]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == self.answers[prompt][:length]


def held_bytes() -> dict[str, int]:
    gc.collect()
    return {
        "active": mx.get_active_memory(),
        "active and cached": mx.get_active_memory() + mx.get_cache_memory(),
        "resident": psutil.Process(os.getpid()).memory_info().rss,
    }


def soak(llm: LLM, traffic: Traffic, rounds: int, per_round: int) -> list[dict[str, int]]:
    history = []
    for _ in range(rounds):
        traffic(llm, per_round)
        history.append(held_bytes())
    return history


def require_flat(history: Sequence[dict[str, Any]]) -> None:
    """After the first half, what is held at the end of a round stays within a megabyte (resident: within 16)."""
    settled = history[len(history) // 2 :]
    for name, slack in (("active", 1 << 20), ("resident", 16 << 20)):
        assert settled[-1][name] - settled[0][name] < slack, [held[name] for held in history]
    assert max(held["active and cached"] for held in history) < 512 << 20


@pytest.mark.parametrize("llm", PATHS, indirect=True)
def test_a_few_hundred_requests(llm: LLM, mlx_lm_tokens: Generate) -> None:
    require_flat(soak(llm, Traffic(mlx_lm_tokens, 1), rounds=6, per_round=20))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("llm", PATHS, indirect=True)
def test_thousands_of_requests(llm: LLM, mlx_lm_tokens: Generate) -> None:
    require_flat(soak(llm, Traffic(mlx_lm_tokens, 2), rounds=40, per_round=100))
