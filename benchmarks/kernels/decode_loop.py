"""Decodes with metal-models on a GPU, without vLLM, beside mlx-lm's BatchGenerator in the same run.

The model has Qwen3-0.6B's shape and random weights. Before anything is timed, hidden rows of the fused decode step and
of the model's own modules are compared with float32's over the same cache, at positions that all differ.
Run it on a machine with an NVIDIA GPU or on a Mac: ``python benchmarks/kernels/decode_loop.py``. ``--plain`` also
times the model's own modules; ``--only 32x2048`` runs one case; ``--no-mlx-lm`` leaves the comparison out.
"""

import argparse
import sys
import time
from collections.abc import Callable

import metal_kernels  # isort: skip  before MLX: it sets MLX's limits
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metal_kv import AttentionMetadata, CacheGroup, CacheLayout, KVCachePool
from metal_models import PagedModel
from metal_models.registry import build

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
BLOCK_SIZE = 16
CASES = ((1, 512, None), (32, 512, None), (32, 2048, None), (128, 1024, None), (32, 2048, 4))
WARM_UP, STEPS = 20, 200


def random_model(bits: int | None) -> nn.Module:
    mx.random.seed(0)
    module = build(CONFIG)
    module.set_dtype(mx.bfloat16)
    if bits is not None:
        nn.quantize(module, group_size=64, bits=bits)
    mx.eval(module.parameters())
    module.eval()
    return module


class Loop:
    """Requests that decode greedily, every step dispatched before the one before it is read."""

    def __init__(self, model: PagedModel, reqs: int, context: int, steps: int) -> None:
        self.model = model
        self.block_table = np.random.default_rng(0).permutation(reqs * -(-(context + steps) // BLOCK_SIZE))
        self.block_table = (self.block_table + 1).astype(np.int32).reshape(reqs, -1)
        specs = model.kv_cache_specs(BLOCK_SIZE)
        group = CacheGroup(tuple(specs), tuple(specs.values()))
        self.pool = KVCachePool(CacheLayout.from_groups([group], self.block_table.size + 1))
        for name in specs:
            self.pool.layer(name).update(lambda pages: mx.random.normal(pages.shape).astype(pages.dtype))
            mx.eval(self.pool.layer(name).kv_cache)
        self.seq_lens = np.full(reqs, context, np.int32)
        self.starts = np.arange(reqs + 1, dtype=np.int32)
        self.token_ids = mx.random.randint(0, CONFIG["vocab_size"], (reqs,)).astype(mx.int32)
        mx.eval(self.token_ids)

    def metadata(self) -> list[AttentionMetadata]:
        """Return what the next step needs to know."""
        return [AttentionMetadata.build(self.starts, self.seq_lens + 1, self.block_table, BLOCK_SIZE)]

    def dispatch(self) -> mx.array:
        """Start a step; returns its tokens."""
        hidden = self.model.forward(self.token_ids, self.metadata(), self.pool)
        self.token_ids = mx.argmax(self.model.compute_logits(hidden), axis=-1).astype(mx.int32)
        mx.async_eval(self.token_ids)
        self.seq_lens = self.seq_lens + 1
        return self.token_ids

    def run(self, steps: int) -> tuple[float, float]:
        """Return seconds for ``steps`` steps, and those that the host was busy with them."""
        busy, before = 0.0, self.token_ids
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            begin = time.perf_counter()
            tokens = self.dispatch()
            busy += time.perf_counter() - begin
            before.tolist()
            before = tokens
        before.tolist()
        return time.perf_counter() - start, busy


def check(fused: PagedModel, reqs: int, bits: int | None) -> str:
    """Compare a fused step, the same step on the model's own modules, and that in float32 from the same weights."""
    loop = Loop(fused, reqs, 300, BLOCK_SIZE)
    loop.seq_lens = 300 - 2 * np.arange(reqs, dtype=np.int32)
    plain = PagedModel(fused.module, CONFIG, compiled_decode=False)
    exact = random_model(bits)
    exact.set_dtype(mx.float32)
    exact_loop = Loop(PagedModel(exact, CONFIG, compiled_decode=False), reqs, 300, BLOCK_SIZE)
    for name in loop.pool.layer_names:
        pages = loop.pool.layer(name).kv_cache.astype(mx.float32)
        exact_loop.pool.layer(name).update(lambda _, pages=pages: pages)
    hidden = [
        model.forward(loop.token_ids, loop.metadata(), pool).astype(mx.float32)
        for model, pool in ((exact_loop.model, exact_loop.pool), (plain, loop.pool), (fused, loop.pool))
    ]
    mx.eval(hidden)
    plain_error, fused_error = (
        (mx.linalg.norm(rows - hidden[0]) / mx.linalg.norm(hidden[0])).item() for rows in hidden[1:]
    )
    if not fused_error < 1.2 * plain_error:
        raise AssertionError(
            f"from float32, the fused step is {fused_error:.3f} away, the plain one {plain_error:.3f}"
        )
    return f"hidden rows are {fused_error:.4f} from float32's, the plain modules' {plain_error:.4f}"


def tokens_per_second(loop: Loop, reqs: int) -> str:
    loop.run(WARM_UP)
    seconds, busy = loop.run(STEPS)
    per_step, host = 1e3 * seconds / STEPS, 1e3 * busy / STEPS
    return f"{reqs * STEPS / seconds:8.0f} tok/s, {per_step:6.2f} ms a step, host {host:.2f} ms"


def memory_over(loop: Loop, steps: int) -> str:
    """Run ``steps`` more steps and say what memory was in use after each quarter of them."""
    used = []
    for _ in range(4):
        loop.run(steps // 4)
        time.sleep(0.1)  # completed steps give their memory back on another thread
        used.append(mx.get_active_memory() / 1e6)
    return f"MB in use after each quarter of {steps} more steps: {', '.join(f'{value:.1f}' for value in used)}"


def mlx_lm_rate(module: nn.Module, reqs: int, context: int, vocab_size: int) -> float:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(module, max_tokens=200, completion_batch_size=reqs, prefill_batch_size=min(reqs, 32))
    prompts = np.random.default_rng(0).integers(1, vocab_size, (reqs, context)).tolist()
    generator.insert(prompts)
    steps, start = 0, 0.0
    while steps < 60:
        _, responses = generator.next()
        if len(responses) == reqs:
            steps += 1
            if steps == 10:
                start = time.perf_counter()
    return 50 * reqs / (time.perf_counter() - start)


def mlx_lm_statistic(module: nn.Module, reqs: int, context: int, vocab_size: int) -> float:
    """Return the tokens per second that mlx-lm itself states of a batch: all steps that decode, the first ones too."""
    from mlx_lm.generate import BatchGenerator

    prompts = np.random.default_rng(0).integers(1, vocab_size, (reqs, context)).tolist()
    for _ in range(2):  # the first run compiles kernels
        generator = BatchGenerator(module, max_tokens=128, completion_batch_size=reqs)
        generator.insert(prompts)
        with generator.stats() as stats:
            while generator.next_generated():
                pass
        generator.close()
    return float(stats.generation_tps)


def timed(case: Callable[[], None]) -> bool:
    try:
        case()
    except Exception as error:  # noqa: BLE001  one failure must not hide the other cases
        print(f"FAILED {type(error).__name__}: {str(error)[:800]}", flush=True)
        return False
    return True


def run_case(reqs: int, context: int, bits: int | None, options: argparse.Namespace) -> None:
    name = f"batch {reqs} x {context}, {'bf16' if bits is None else f'{bits}-bit'}"
    module = random_model(bits)
    fused = PagedModel(module, CONFIG)
    print(f"{name}: {check(fused, reqs, bits)}", flush=True)
    for label, model in (("fused", fused), ("plain", PagedModel(module, CONFIG, compiled_decode=False))):
        if label == "fused" or options.plain:
            loop = Loop(model, reqs, context, WARM_UP + STEPS + options.memory_steps)
            print(f"{name}: {label} {tokens_per_second(loop, reqs)}", flush=True)
            if label == "fused" and options.memory_steps:
                print(f"{name}: {memory_over(loop, options.memory_steps)}", flush=True)
            del loop
    if options.mlx_lm:
        rate, stated = (
            measure(module, reqs, context, CONFIG["vocab_size"]) for measure in (mlx_lm_rate, mlx_lm_statistic)
        )
        print(
            f"{name}: mlx-lm {rate:8.0f} tok/s with all requests under way, {stated:8.0f} by its own statistic",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one case, as in 32x2048")
    parser.add_argument("--plain", action="store_true", help="also time the model's own modules")
    parser.add_argument("--no-mlx-lm", dest="mlx_lm", action="store_false", help="leave mlx-lm out")
    parser.add_argument("--memory-steps", type=int, default=0, help="further steps over which memory is watched")
    options = parser.parse_args()
    if metal_kernels.target() == "cpu":
        print("decode_loop needs a GPU: the default device is a CPU")
        return 1
    print(f"MLX {mx.__version__} on {metal_kernels.target()}: {mx.device_info()}")
    passed = [
        timed(lambda c=case: run_case(*c, options)) for case in CASES if options.only in (None, f"{case[0]}x{case[1]}")
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
