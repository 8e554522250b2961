"""Which range of keys each threadgroup of paged decode attends to."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels.device import Target, target
from metal_kernels.ragged import RaggedBatch, device_array

_MIN_RANGE = 256  # keys: fewer cost more to join than they save
_ROUND = 64  # keys that a threadgroup takes per round at most
_GROUPS_PER_CORE = {"metal": 8, "cuda": 2}
# Cores of Apple's GPUs by the last letter of their architecture; a guess for any other.
_APPLE_CORES = {"p": 6, "g": 10, "s": 36, "d": 72}
_CORES = {"metal": 10, "cuda": 132}


@dataclass(frozen=True, eq=False)
class WorkList:
    """The one-row requests of a step, cut into ranges of keys.

    Attributes:
        work: Row of the query, first entry in the flat block table, first key and end of the keys, per range.
        ranges: First range and number of ranges, per request.
        num_ranges: Length of ``work``.
        direct: Whether every request is one range.
    """

    work: Int32[mx.array, "work_elements"]
    ranges: Int32[mx.array, "range_elements"]
    num_ranges: int
    direct: bool


def work_list(
    batch: RaggedBatch,
    requests: Int32[np.ndarray, "decodes"],
    sliding_window: int | None,
    groups_per_range: int,
    wanted_groups: int,
) -> WorkList:
    """Cut the keys that ``requests`` see so that about ``wanted_groups`` threadgroups share them evenly.

    Args:
        batch: The step.
        requests: Requests that have one row.
        sliding_window: Keys a row sees at most; the loop never visits others.
        groups_per_range: Threadgroups that take the same range, for different heads.
        wanted_groups: Threadgroups that fill the device.
    """
    ends = batch.seq_lens[requests].astype(np.int64)
    begins = np.zeros_like(ends) if sliding_window is None else np.maximum(0, ends - sliding_window)
    num_keys = ends - begins
    target_keys = max(_MIN_RANGE, int(num_keys.sum()) * groups_per_range / wanted_groups)
    counts = np.maximum(1, np.rint(num_keys / target_keys)).astype(np.int64)
    lengths = -(-num_keys // counts)
    lengths = np.where(counts > 1, -(-lengths // _ROUND) * _ROUND, lengths)
    counts = -(-num_keys // lengths)
    first = np.cumsum(counts) - counts
    request = np.repeat(np.arange(len(requests)), counts)
    range_begins = begins[request] + (np.arange(counts.sum()) - first[request]) * lengths[request]
    work = np.stack(
        [
            batch.query_start_loc[requests][request],
            requests[request] * batch.block_table.shape[1],
            range_begins,
            np.minimum(range_begins + lengths[request], ends[request]),
        ],
        axis=1,
    )
    ranges = np.stack([first, counts], axis=1)
    return WorkList(device_array(work), device_array(ranges), len(work), bool((counts == 1).all()))


def wanted_groups() -> int:
    """Threadgroups that keep the default device busy."""
    return _wanted_groups(target())


@cache
def _wanted_groups(backend: Target) -> int:
    if backend == "cpu":
        return 16
    cores = _CORES[backend]
    if backend == "metal":
        cores = _APPLE_CORES.get(str(mx.device_info().get("architecture", ""))[-1:], cores)
    return cores * _GROUPS_PER_CORE[backend]
