"""Decodes small hybrid models over the paged cache and over mlx-lm's contiguous caches, on a CPU.

The first tokens of both paths are compared, during which what is compiled gets compiled; then the process's CPU time
and the clock's time of a step are taken in turns of two steps, each path being the first in every other turn. Speeds
are medians of the turns' ratios. The BLAS has one thread: others would spend CPU time waiting.
Run it with ``python benchmarks/kv/hybrid_paths.py``.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import metal_kernels.freed_memory  # isort: skip  before MLX: it chooses the BLAS
import mlx.core as mx
import numpy as np

from metal_models import PagedModel
from metal_models.contiguous import ContiguousModel, RequestRows
from metal_models.registry import build

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from hybrid_loop import MODELS, HybridLoop

CONTEXT, FIRST, STEPS, ROUNDS, VOCABULARY = 64, 8, 2, 20, 4096
STEPS_IN_ALL = FIRST + STEPS * ROUNDS
SMALL: dict[str, dict[str, Any]] = {
    "qwen3.5": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1024,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "num_attention_heads": 4,
        "head_dim": 128,
    },
    "mamba2": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_heads": 16},
    "lfm2": {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "block_dim": 512,
        "block_ff_dim": 2048,
        "num_hidden_layers": 8,
        "full_attn_idxs": [2, 5],
    },
}


def small_model(name: str) -> PagedModel:
    config = dict(MODELS[name])
    changes = SMALL[name] | {"vocab_size": VOCABULARY}
    config = config | ({"text_config": config["text_config"] | changes} if "text_config" in config else changes)
    mx.random.seed(0)
    module = build(config)
    mx.eval(module.parameters())
    module.eval()
    return PagedModel(module, config)


def paged(model: PagedModel, prompts: np.ndarray) -> Callable[[], list[int]]:
    loop = HybridLoop(model, len(prompts), CONTEXT, STEPS_IN_ALL)
    loop.prefill(prompts)
    loop.token_ids = mx.array(prompts[:, 0])

    def step() -> list[int]:
        hidden = model.forward(loop.token_ids, loop.metadata(), loop.pool)
        loop.token_ids = mx.argmax(model.compute_logits(hidden), axis=-1).astype(mx.int32)
        mx.eval(loop.token_ids, loop.pool.arrays())
        loop.seq_lens = loop.seq_lens + 1
        return loop.token_ids.tolist()

    return step


def contiguous(model: PagedModel, prompts: np.ndarray) -> Callable[[], list[int]]:
    over = ContiguousModel(model)
    known = np.pad(prompts, [(0, 0), (0, STEPS_IN_ALL)])
    requests = [RequestRows(str(r), 0, CONTEXT, prompts[r]) for r in range(len(prompts))]
    mx.eval(over.forward(mx.array(prompts.reshape(-1)), requests), over.arrays())
    at, token_ids = CONTEXT, mx.array(prompts[:, 0])

    def step() -> list[int]:
        nonlocal at, token_ids
        requests = [RequestRows(str(r), at, at + 1, known[r]) for r in range(len(known))]
        hidden = over.forward(token_ids, requests)
        token_ids = mx.argmax(over.compute_logits(hidden), axis=-1).astype(mx.int32)
        mx.eval(token_ids, over.arrays())
        at += 1
        return token_ids.tolist()

    return step


def step_ms(step: Callable[[], list[int]]) -> np.ndarray:
    """Return milliseconds of CPU and of the clock that a step takes."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(STEPS):
        step()
    after, end = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return np.array([cpu, end - begin]) * 1e3 / STEPS


def main() -> None:
    mx.set_default_device(mx.cpu)
    metal_kernels.freed_memory.keep_freed_memory()  # as the worker does
    for name in SMALL:
        model = small_model(name)
        for reqs in (1, 8):
            prompts = np.random.default_rng(0).integers(1, VOCABULARY, (reqs, CONTEXT)).astype(np.int32)
            paths = [paged(model, prompts), contiguous(model, prompts)]
            first = [[step() for _ in range(FIRST)] for step in paths]
            if first[0] != first[1]:
                raise AssertionError(f"{name}: the paths choose different tokens: {first}")
            times = np.zeros((ROUNDS, 2, 2))
            for turn in range(ROUNDS):
                for path in (turn % 2, 1 - turn % 2):
                    times[turn, path] = step_ms(paths[path])
            speeds = np.median(times[:, 1] / times[:, 0], axis=0)
            least = times.min(axis=0)[:, 0]
            print(
                f"{name}, {reqs} requests: at best paged {least[0]:.1f} ms, contiguous {least[1]:.1f} ms of CPU; "
                f"speed {speeds[0]:.2f}, by the clock {speeds[1]:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
