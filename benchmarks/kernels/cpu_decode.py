"""Decode attention on a CPU: cache write and paged attention of every layer, against mlx-lm's KVCache and SDPA.

    python benchmarks/kernels/cpu_decode.py [--contexts 64 256 1000] [--batch 1 8] [--dtype float32]

Times are processor time, all threads together. Outputs are compared before a ratio is printed; above 1 the
paged path is the faster one.
"""

import argparse
import time
from collections.abc import Callable

import metal_kernels  # isort: skip  # before mlx.core, to give it a fast BLAS
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from metal_kernels import RaggedBatch

BLOCK_SIZE = 16


def paged_step(
    args: argparse.Namespace, rows: list[mx.array], batch_size: int, context: int, filled: mx.array
) -> Callable[[], mx.array]:
    """Return a function that writes one row per request and layer and attends, over shuffled blocks."""
    blocks = -(-(context + 1) // BLOCK_SIZE)
    rng = np.random.default_rng(0)
    table = rng.permutation(batch_size * blocks).astype(np.int32).reshape(batch_size, blocks) + 1
    pages = mx.zeros((batch_size * blocks + 1, 2, BLOCK_SIZE, *filled.shape[3:]), filled.dtype)
    positions = np.arange(context, dtype=np.int32)
    slots = (table[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).ravel()
    keys, values = (half.reshape(-1, *filled.shape[3:]) for half in filled)
    caches = []
    for _ in range(args.layers):
        caches.append(metal_kernels.reshape_and_cache(keys, values, pages * 1, mx.array(slots))[0])
        mx.eval(caches)
    query, key, value = rows

    def step() -> mx.array:
        batch = RaggedBatch(
            np.arange(batch_size + 1, dtype=np.int32), np.full(batch_size, context + 1, np.int32), table
        )
        slot = mx.array(table[:, context // BLOCK_SIZE] * BLOCK_SIZE + context % BLOCK_SIZE)
        hidden = query
        for layer in range(args.layers):
            caches[layer], token = metal_kernels.reshape_and_cache(key, value, caches[layer], slot)
            hidden = metal_kernels.paged_attention(
                hidden, caches[layer], batch, scale=args.head_size**-0.5, order_token=token
            )
        mx.eval(hidden, caches)
        return hidden

    return step


def dense_step(args: argparse.Namespace, rows: list[mx.array], filled: mx.array) -> Callable[[], mx.array]:
    """Return the same step as mlx-lm does it: one dense cache, equal lengths."""
    query, key, value = (row[:, :, None] for row in rows)
    caches = []
    for _ in range(args.layers):
        cache = KVCache()
        cache.update_and_fetch(*(half.transpose(0, 2, 1, 3) for half in filled))
        mx.eval(cache.state)
        caches.append(cache)

    def step() -> mx.array:
        hidden = query
        for cache in caches:
            keys, values = cache.update_and_fetch(key, value)
            hidden = mx.fast.scaled_dot_product_attention(hidden, keys, values, scale=args.head_size**-0.5, mask=None)
            cache.trim(1)
        mx.eval(hidden, [cache.state for cache in caches])
        return hidden[:, :, 0]

    return step


def best_ms(steps: list[Callable[[], mx.array]], repeats: int) -> list[float]:
    """Return the least processor time of each step: unlike elapsed time, other load hardly changes it."""
    best = [float("inf")] * len(steps)
    for _ in range(repeats):
        for index, step in enumerate(steps):
            start = time.process_time()
            step()
            best[index] = min(best[index], (time.process_time() - start) * 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1000])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--q-heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    dtype = getattr(mx, args.dtype)
    for batch_size in args.batch:
        for context in args.contexts:
            heads = (args.q_heads, args.kv_heads, args.kv_heads)
            rows = [mx.random.normal((batch_size, h, args.head_size)).astype(dtype) for h in heads]
            shape = (2, batch_size, context, args.kv_heads, args.head_size)
            filled = mx.random.normal(shape).astype(dtype)
            mx.eval(rows, filled)
            paged = paged_step(args, rows, batch_size, context, filled)
            dense = dense_step(args, rows, filled)
            tolerance = 1e-4 if dtype == mx.float32 else 2e-2
            np.testing.assert_allclose(
                np.array(paged().astype(mx.float32)),
                np.array(dense().astype(mx.float32)),
                atol=tolerance,
                rtol=tolerance,
            )
            mine, theirs = best_ms([paged, dense], args.repeats)
            print(
                f"batch {batch_size:3d}  context {context:5d}  {args.dtype}: "
                f"paged {mine:7.2f} ms  dense {theirs:7.2f} ms  ratio {theirs / mine:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
