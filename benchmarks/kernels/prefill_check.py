"""Checks prefill attention on a GPU against its twin, then measures its routes beside MLX's contiguous attention.

Run it on a machine with an NVIDIA GPU or on a Mac: ``python benchmarks/kernels/prefill_check.py``. The exit status is
1 if a case failed.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import metal_kernels  # isort: skip  before MLX: it sets MLX's limits
import gpu_check
import mlx.core as mx
import numpy as np
from gpu_check import batch_of, case, close

from metal_kernels import kernels, reference

ROUTES = ("tiled", "gathered", "chosen", "own rows")
TURNS = 12


def route(name: str, head_size: int, dtype: mx.Dtype = mx.bfloat16) -> Callable[..., mx.array]:
    if name == "tiled":
        variant = kernels.prefill_kernel(metal_kernels.target(), dtype, dtype, head_size).variant
        return partial(kernels.prefill_tiled, variant=variant)
    return kernels.prefill_gathered if name == "gathered" else kernels.prefill


def check(name: str, head_size: int, dtype: mx.Dtype, **options: float) -> str:
    batch, blocks = batch_of([300, 70, 5, 900], 16, [300, 1, 5, 100])
    query = (mx.random.normal((batch.num_tokens, 8, head_size)) * 2).astype(dtype)
    cache = mx.random.normal((blocks, 2, 16, 2, head_size)).astype(dtype)
    options = {"scale": head_size**-0.5, **options}
    mx.eval(query, cache)
    want = reference.paged_attention(query.astype(mx.float32), cache.astype(mx.float32), batch, **options)
    if name == "own rows":
        name, options = "gathered", options | own_rows(batch, cache)
    return close(route(name, head_size, dtype)(query, cache, batch=batch, **options), want, dtype)


def own_rows(batch: metal_kernels.RaggedBatch, cache: mx.array) -> dict[str, mx.array]:
    """Return the keys and values of the step's rows, which the cache has already."""
    requests = np.repeat(np.arange(batch.num_reqs), batch.query_lens)
    rows = np.arange(batch.num_tokens) - np.repeat(batch.query_start_loc[:-1], batch.query_lens)
    at = np.repeat(batch.seq_lens - batch.query_lens, batch.query_lens) + rows
    block_ids, offsets = mx.array(batch.block_table[requests, at // 16]), mx.array(at % 16)
    return {"key": cache[block_ids, 0, offsets], "value": cache[block_ids, 1, offsets]}


def speed(prompts: list[int], contexts: list[int], q_heads: int, kv_heads: int, head_size: int) -> str:
    """Time all routes, in turns, over rows as projections give them: compiled, then launched from Python."""
    batch, blocks = batch_of(contexts, 16, prompts)
    query = mx.random.normal((batch.num_tokens, q_heads, head_size)).astype(mx.bfloat16)
    cache = mx.random.normal((blocks, 2, 16, kv_heads, head_size)).astype(mx.bfloat16)
    mx.eval(query, cache)
    pairs = sum(p * (c - p) + p * (p + 1) / 2 for p, c in zip(prompts, contexts, strict=True))
    operations = 4 * pairs * q_heads * head_size
    links = max(1, min(20, int(1e13 / operations)))
    routes: dict[str, Callable[[mx.array], mx.array]] = {}
    if len(prompts) == 1:
        keys, values = (mx.random.normal((1, kv_heads, contexts[0], head_size)).astype(mx.bfloat16) for _ in range(2))
        mx.eval(keys, values)
        routes["contiguous"] = partial(contiguous, keys, values)
    for name in ROUTES:
        own = own_rows(batch, cache) if name == "own rows" else {}
        mx.eval(own)
        routes[name] = partial(route(name, head_size), kv_cache=cache, batch=batch, scale=0.1, **own)
    lines = []
    for how in ("compiled", "from Python"):
        chains = {name: partial(chain, attend, links) for name, attend in routes.items()}
        if how == "compiled":
            chains = {name: mx.compile(step) for name, step in chains.items()}
        # The tiled kernel draws less power: what follows it would find a cooler, faster chip.
        alone = {"tiled": chains.pop("tiled")}
        taken = in_turns(chains, query, links) | in_turns(alone, query, links)
        first = next(iter(taken.values()))
        lines.append(
            f"{how}: "
            + ", ".join(
                f"{name} {spent * 1e6:.1f} us ({operations / spent / 1e12:.0f} TFLOP/s, {first / spent:.3f})"
                for name, spent in taken.items()
            )
        )
    return "; ".join(lines)


def contiguous(keys: mx.array, values: mx.array, rows: mx.array) -> mx.array:
    """Attend as mlx-lm does, from rows to rows over keys that lie together, head by head."""
    queries = mx.expand_dims(rows, 0).swapaxes(1, 2)
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1, mask="causal")
    return out.squeeze(0).swapaxes(0, 1)


def chain(attend: Callable[[mx.array], mx.array], links: int, rows: mx.array) -> mx.array:
    for _ in range(links):
        rows = attend(rows)
    return rows


def in_turns(chains: dict[str, Callable[[mx.array], mx.array]], rows: mx.array, links: int) -> dict[str, float]:
    """Return each chain's time of a link: the median of turns that they take, forwards and backwards."""
    times: dict[str, list[float]] = {name: [] for name in chains}
    for turn in range(TURNS + 1):
        for name, step in list(chains.items())[:: 1 if turn % 2 else -1]:
            start, last = time.perf_counter(), rows
            for _ in range(6):
                last = step(last)
                mx.async_eval(last)
            mx.eval(last)
            if turn:  # the first one compiles
                times[name].append((time.perf_counter() - start) / (6 * links))
    return {name: float(np.median(taken)) for name, taken in times.items()}


def main() -> int:
    if metal_kernels.target() == "cpu":
        print("prefill_check needs a GPU: the default device is a CPU")
        return 1
    print(f"MLX {mx.__version__} on {metal_kernels.target()}: {mx.device_info()}")
    for dtype in (mx.float16, mx.bfloat16):
        for head_size in (64, 128):
            for name in ROUTES:
                case(f"{name} {dtype} {head_size}", lambda n=name, h=head_size, d=dtype: check(n, h, d))
    case("tiled 256", lambda: check("tiled", 256, mx.bfloat16))
    case("tiled window, soft cap", lambda: check("tiled", 128, mx.bfloat16, sliding_window=50, soft_cap=5.0))
    cases = {
        "2k": ([2048], [2048]),
        "8k": ([8192], [8192]),
        "32k": ([32768], [32768]),
        "512 rows at 8k": ([512], [8192]),
        "64 rows at 8k": ([64], [8192]),
        "16 prompts of 512": ([512] * 16, [512] * 16),
        "32 prompts of 64": ([64] * 32, [64] * 32),
    }
    for name, (prompts, contexts) in cases.items():
        case(f"{name}, 16/8 heads x 128", lambda p=prompts, c=contexts: speed(p, c, 16, 8, 128))
    print(f"{gpu_check.failures} failed")
    return min(gpu_check.failures, 1)


if __name__ == "__main__":
    sys.exit(main())
