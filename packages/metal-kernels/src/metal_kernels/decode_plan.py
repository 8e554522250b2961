"""Which range of keys each threadgroup of decode attention takes."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels.device import Target, target
from metal_kernels.ragged import RaggedBatch, device_array

MIN_RANGE = 256
"""Keys of a range at least: fewer cost more to join than they save."""

MIN_LATENT_RANGE = 64
"""Likewise for latents, whose ranges are joined in any case."""

_ROUND = 64  # keys that a threadgroup takes per round at most
_SIMDGROUPS_PER_CORE = {"metal": 64, "cuda": 16}
# Cores of Apple's GPUs by the last letter of their architecture; a guess for any other.
_APPLE_CORES = {"p": 6, "g": 10, "s": 36, "d": 72}
_CORES = {"metal": 10, "cuda": 132}
_MIN_ELEMENTS = 8  # MLX puts smaller inputs in another Metal address space


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Requests that have one row each, their keys cut into ranges.

    The arrays may be lazy or, while a step is compiled, have no values yet: sizes are in the other fields.

    Attributes:
        block_table: Block tables of all requests, one after the other.
        work: Row of the query, first entry in ``block_table``, first key and end of the keys, per range. A range
            without keys is skipped.
        ranges: First range and number of ranges, per request. A request without ranges gets zeros.
        num_reqs: Number of requests.
        num_ranges: Number of ranges. As many as requests means that request ``i`` is range ``i``.
    """

    block_table: Int32[mx.array, "table_elements"]
    work: Int32[mx.array, "work_elements"]
    ranges: Int32[mx.array, "range_elements"]
    num_reqs: int
    num_ranges: int

    @property
    def direct(self) -> bool:
        """Whether every request is one range, so that nothing has to be joined."""
        return self.num_ranges == self.num_reqs


@dataclass(frozen=True)
class DecodeSizes:
    """Sizes that steps are padded to, so that one compiled step serves many.

    Attributes:
        reqs: Requests.
        ranges: Ranges of keys.
        blocks: Blocks of each request's table.
    """

    reqs: int
    ranges: int
    blocks: int

    @property
    def elements(self) -> tuple[int, int, int]:
        """Elements of a plan's block table, work and ranges."""
        sizes = (self.reqs * self.blocks, 4 * self.ranges, 2 * self.reqs)
        return tuple(max(_MIN_ELEMENTS, size) for size in sizes)  # type: ignore[return-value]

    def unpack(self, packed: Int32[mx.array, "elements"]) -> DecodePlan:
        """Return the plan that :func:`pack_decode` packed."""
        table, work, _ = self.elements
        return DecodePlan(packed[:table], packed[table : table + work], packed[table + work :], self.reqs, self.ranges)


def plan_decode(
    batch: RaggedBatch,
    requests: Int32[np.ndarray, "decodes"],
    sliding_window: int | None,
    simdgroups_per_range: int,
    min_range: int = MIN_RANGE,
) -> DecodePlan:
    """Cut the keys that ``requests`` see so that threadgroups fill the device evenly.

    Args:
        batch: The step.
        requests: Requests that have one row.
        sliding_window: Keys a row sees at most; no range holds others.
        simdgroups_per_range: SIMD-groups that take the same range, of all its threadgroups.
        min_range: Keys of a range at least.
    """
    work, ranges = _cut(batch, requests, sliding_window, simdgroups_per_range, min_range, batch.block_table.shape[1])
    return DecodePlan(
        batch.on_device("block_table"), device_array(work), device_array(ranges), len(requests), len(work)
    )


def pack_decode(
    batch: RaggedBatch,
    sliding_window: int | None,
    simdgroups_per_range: int,
    reqs: int,
    block_size: int,
    min_range: int = MIN_RANGE,
) -> tuple[DecodeSizes, Int32[np.ndarray, "elements"]]:
    """Plan a step in which every request has one row, as one array of a size that many steps share.

    Args:
        batch: The step; its requests have one row each.
        sliding_window: Keys a row sees at most.
        simdgroups_per_range: SIMD-groups that take the same range, of all its threadgroups.
        reqs: Requests to pad to.
        block_size: Tokens of a block.
        min_range: Keys of a range at least.
    """
    used = -(-batch.max_seq_len // block_size)
    blocks = max(_MIN_ELEMENTS, 1 << (used - 1).bit_length())
    requests = np.arange(batch.num_reqs, dtype=np.int32)
    work, ranges = _cut(batch, requests, sliding_window, simdgroups_per_range, min_range, blocks)
    direct = len(work) == batch.num_reqs
    sizes = DecodeSizes(reqs, reqs if direct else reqs + wanted_simdgroups() // simdgroups_per_range, blocks)
    table, work_elements, _ = sizes.elements
    packed = np.zeros(sum(sizes.elements), np.int32)
    packed[: batch.num_reqs * blocks].reshape(-1, blocks)[:, :used] = batch.block_table[:, :used]
    packed[table : table + work.size] = work.ravel()
    packed[table + work_elements : table + work_elements + ranges.size] = ranges.ravel()
    return sizes, packed


def _cut(
    batch: RaggedBatch,
    requests: Int32[np.ndarray, "decodes"],
    sliding_window: int | None,
    simdgroups_per_range: int,
    min_range: int,
    blocks: int,
) -> tuple[Int32[np.ndarray, "ranges 4"], Int32[np.ndarray, "decodes 2"]]:
    """Return ``work`` and ``ranges`` of a plan whose tables have ``blocks`` entries for each request."""
    ends, rows = batch.seq_lens[requests], batch.query_start_loc[requests]
    begins = np.zeros_like(ends) if sliding_window is None else np.maximum(0, ends - sliding_window)
    num_keys = ends - begins
    target_keys = max(min_range, int(num_keys.sum()) * simdgroups_per_range / wanted_simdgroups())
    if num_keys.max() < 1.5 * target_keys:
        counts = np.ones_like(ends)
        first = np.arange(len(requests), dtype=np.int32)
        return np.stack([rows, requests * blocks, begins, ends], axis=1), np.stack([first, counts], axis=1)
    counts = np.maximum(1, np.rint(num_keys / target_keys)).astype(np.int32)
    lengths = -(-num_keys // counts)
    lengths = np.where(counts > 1, -(-lengths // _ROUND) * _ROUND, lengths)
    counts = -(-num_keys // lengths)
    first = np.cumsum(counts, dtype=np.int32) - counts
    request = np.repeat(np.arange(len(requests)), counts)
    range_begins = begins[request] + (np.arange(len(request), dtype=np.int32) - first[request]) * lengths[request]
    range_ends = np.minimum(range_begins + lengths[request], ends[request])
    work = np.stack([rows[request], requests[request] * blocks, range_begins, range_ends], axis=1)
    return work.astype(np.int32), np.stack([first, counts], axis=1)


def wanted_simdgroups() -> int:
    """SIMD-groups that keep the default device busy."""
    return _wanted_simdgroups(target())


@cache
def _wanted_simdgroups(backend: Target) -> int:
    if backend == "cpu":
        return 128
    cores = _CORES[backend]
    if backend == "metal":
        cores = _APPLE_CORES.get(str(mx.device_info().get("architecture", ""))[-1:], cores)
    return cores * _SIMDGROUPS_PER_CORE[backend]
