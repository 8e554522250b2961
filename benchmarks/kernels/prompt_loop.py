"""Computes prompts on a GPU, without vLLM, beside mlx-lm's own modules over its own caches in the same run.

Both compute all hidden rows of a prompt and what later tokens need of them: at once, and in pieces of 2,048 tokens as
mlx-lm does. Before anything is timed, the last hidden rows of both are compared with each other. Models are those of
decode_loop and hybrid_loop. Run it on a machine with an NVIDIA GPU or on a Mac:
``python benchmarks/kernels/prompt_loop.py``. ``--only latent`` runs one model, ``--lengths 2048`` one length.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import metal_kernels  # isort: skip  before MLX: it sets MLX's limits
import decode_loop
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hybrid_loop import MODELS, HybridLoop, random_model, vocab_size
from mlx_lm.models.cache import make_prompt_cache

from metal_models import PagedModel
from metal_models.head_split import HeadSplit

SHAPES = {"qwen3": decode_loop.CONFIG, "qwen3.5": MODELS["qwen3.5"], "latent": MODELS["latent"]}
PIECE = 2048
REPEATS = 5


class Prompt(HybridLoop):
    """One request whose prompt is computed again and again."""

    def __init__(self, model: PagedModel, length: int) -> None:
        super().__init__(model, 1, length, 16)

    def compute(self, ids: np.ndarray, piece: int) -> mx.array:
        """Compute a prompt and return its last hidden rows."""
        hidden = mx.zeros(0)
        for start in range(0, len(ids), piece):
            rows = ids[start : start + piece]
            ends = np.array([start + len(rows)], np.int32)
            metadata = self.metadata(np.array([0, len(rows)], np.int32), ends)
            hidden = self.model.forward(mx.array(rows), metadata, self.pool)
            mx.eval(hidden, self.pool.arrays())
        return hidden


def mlx_lm_rows(module: nn.Module, split: HeadSplit, ids: np.ndarray, piece: int) -> mx.array:
    """Compute a prompt over mlx-lm's caches and return its last hidden rows."""
    cache = make_prompt_cache(module)
    hidden = mx.zeros(0)
    for start in range(0, len(ids), piece):
        hidden = split.hidden(mx.array(ids[None, start : start + piece]), cache)
        mx.eval(hidden, [layer.state for layer in cache])
    return hidden[0]


def rate(compute: Callable[[], mx.array], tokens: int) -> str:
    compute()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        compute()
        mx.synchronize()
        seconds.append(time.perf_counter() - start)
    best = min(seconds)
    return f"{tokens / best:9.0f} tok/s, {1e3 * best:8.2f} ms (median {1e3 * float(np.median(seconds)):.2f})"


def run_model(name: str, lengths: list[int]) -> None:
    config: dict[str, Any] = SHAPES[name]
    module = random_model(config)
    split = HeadSplit(module)
    model = PagedModel(random_model(config), config)
    for length in lengths:
        ids = np.random.default_rng(0).integers(1, vocab_size(config), length).astype(np.int32)
        prompt = Prompt(model, length)
        for piece in sorted({length, min(length, PIECE)}):
            ours = prompt.compute(ids, piece).astype(mx.float32)
            theirs = mlx_lm_rows(module, split, ids, piece).astype(mx.float32)
            apart = (mx.linalg.norm(ours - theirs) / mx.linalg.norm(theirs)).item()
            print(f"{name} {length} in pieces of {piece}: last rows are {apart:.4f} apart", flush=True)
            if not apart < 0.2:
                raise AssertionError("the two do not compute the same")
            theirs = ours = mx.zeros(0)
            for label, compute in (
                ("ours", partial(prompt.compute, ids, piece)),
                ("mlx-lm", partial(mlx_lm_rows, module, split, ids, piece)),
            ):
                print(f"{name} {length} in pieces of {piece}: {label:6} {rate(compute, length)}", flush=True)
        del prompt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(SHAPES))
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 8192])
    options = parser.parse_args()
    print(f"MLX {mx.__version__} on {metal_kernels.target()}: {mx.device_info()}")
    passed = [decode_loop.timed(lambda n=name: run_model(n, options.lengths)) for name in options.only]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
