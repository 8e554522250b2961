"""What the host does for a step's block tables: 256 decodes at 128k tokens, kernel blocks translated.

    python benchmarks/kv/block_tables.py [--context 131072] [--block-size 160] [--kernel-block-size 32]

Three figures, processor time per step, and the least of many: blocks appended to the rows that need one, the table of
the step with its slot mapping (what a step costs), and for comparison a translation of the whole table. Slots and
table are compared with a plain translation first.
"""

import argparse
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from metal_kv import AttentionMetadata, BlockTable, kernel_block_table, slot_mapping, token_positions


def best_ms(work: Callable[[], object], repeats: int = 200) -> float:
    """Return the least processor time of one call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--context", type=int, default=131_072)
    parser.add_argument("--block-size", type=int, default=160)
    parser.add_argument("--kernel-block-size", type=int, default=32)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    ratio = args.block_size // args.kernel_block_size
    blocks = -(-args.context // args.block_size)
    table = BlockTable(args.requests, blocks + 1, ratio)
    rng = np.random.default_rng(0)
    ids = rng.permutation(args.requests * blocks).astype(np.int32).reshape(args.requests, blocks) + 1
    for row, row_ids in enumerate(ids):
        table.add_row(row, row_ids)
    starts = np.arange(args.requests + 1, dtype=np.int32)
    lens = rng.integers(args.context // 2, args.context, args.requests, endpoint=True).astype(np.int32)

    def step() -> AttentionMetadata:
        return AttentionMetadata.build(starts, lens, table.rows(args.requests), args.kernel_block_size)

    def append() -> None:
        # One row in block_size needs a block; here as many as that makes of this batch.
        for row in range(-(-args.requests // args.block_size)):
            table.append_row(row, [1])
            table.add_row(row, ids[row])

    metadata = step()
    np.testing.assert_array_equal(metadata.batch.block_table, kernel_block_table(ids, ratio))
    expected = slot_mapping(starts, token_positions(starts, lens), ids, args.block_size)
    np.testing.assert_array_equal(np.array(metadata.slot_mapping), expected)
    shuffled = rng.permutation(args.requests)
    print(
        f"{args.requests} requests of up to {args.context} tokens, blocks of {args.block_size} as {ratio} kernel "
        f"blocks: {best_ms(append):.3f} ms to append, {best_ms(step):.3f} ms for table and slots of a step "
        f"({best_ms(lambda: table.rows(shuffled)):.3f} ms more when its rows do not follow one another); "
        f"translating the whole table: {best_ms(lambda: kernel_block_table(ids, ratio)):.3f} ms"
    )


if __name__ == "__main__":
    main()
