"""Decodes small hybrid models over the paged cache and over mlx-lm's contiguous caches, on a CPU.

The first tokens of both paths are compared; then the process's CPU time of a step is taken in turns of two steps. The
speed is the median of the turns' ratios. The BLAS has one thread: others would spend CPU time waiting.
Run it with ``python benchmarks/kv/hybrid_paths.py``.
"""

import os
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import metal_kernels  # noqa: F401  isort: skip  before MLX: it chooses the BLAS
import mlx.core as mx
import numpy as np

from metal_models import PagedModel
from metal_models.contiguous import ContiguousModel, RequestRows
from metal_models.registry import build

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from hybrid_loop import MODELS, HybridLoop

CONTEXT, FIRST, STEPS, ROUNDS, VOCABULARY = 64, 4, 2, 20, 4096
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


def cpu_ms(step: Callable[[], list[int]]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(STEPS):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / STEPS


def main() -> None:
    mx.set_default_device(mx.cpu)
    for name in SMALL:
        model = small_model(name)
        for reqs in (1, 8):
            prompts = np.random.default_rng(0).integers(1, VOCABULARY, (reqs, CONTEXT)).astype(np.int32)
            paths = {"paged": paged(model, prompts), "contiguous": contiguous(model, prompts)}
            first = [[step() for _ in range(FIRST)] for step in paths.values()]
            if first[0] != first[1]:
                raise AssertionError(f"{name}: the paths choose different tokens: {first}")
            times = [{path: cpu_ms(step) for path, step in paths.items()} for _ in range(ROUNDS)]
            best = {path: min(time[path] for time in times) for path in paths}
            speed = statistics.median(time["contiguous"] / time["paged"] for time in times)
            print(
                f"{name}, {reqs} requests: at best paged {best['paged']:.1f} ms, contiguous "
                f"{best['contiguous']:.1f} ms; speed {speed:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
