"""How many bytes the KV cache may have: the device's memory less the weights and one worst-case step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from metal_kv import AttentionMetadata, CacheGroup, CacheLayout, KVCachePool, KVCacheSpec, RecurrentStateSpec
from metal_models import PagedModel
from vllm_metal_plugin import device
from vllm_metal_plugin.device import Target
from vllm_metal_plugin.envs import MetalEnvs

if TYPE_CHECKING:
    from vllm.config import CacheConfig

DEFAULT_FRACTION = 0.9
CPU_FRACTION = 0.5
CPU_KV_CACHE_BYTES = 4 << 30
"""On a CPU the machine has other uses for its memory; a larger cache has to be asked for."""
LEAST_BUFFER_CACHE_BYTES = 256 << 20
"""Freed buffers that MLX may keep for reuse even when a step needs less."""
PROFILE_ROWS_ON_CPU = 64
"""A CPU takes seconds for a full step; its activations are measured on fewer rows and scaled up."""


def expanded_weights_limit(target: Target, dtype: mx.Dtype) -> int:
    """Bytes up to which weights are held in float32, where MLX's quantized matmul is slower than its float one."""
    return device.free_memory_bytes() // 4 if target == "cpu" and dtype == mx.float32 else 0


def contiguous_shares(left_bytes: int, total_bytes: int, prefix_fraction: float) -> tuple[int, int]:
    """Divide what weights and one step leave between requests' caches and kept prefixes.

    Of the caches' share half is planned with: arrays grow in steps, are copied when they do, and decode together
    padded to the longest.

    Args:
        left_bytes: What weights and one step leave.
        total_bytes: The device's memory.
        prefix_fraction: Share of that for prefixes; 0 keeps none.

    Returns:
        Bytes of tokens that the scheduler may plan with, and of prefixes.
    """
    prefixes = min(int(total_bytes * prefix_fraction), max(0, left_bytes) // 2)
    return (left_bytes - prefixes) // 2, prefixes


@dataclass(frozen=True)
class MemoryLimit:
    """How much memory may be planned with, and whether a user said so."""

    total_bytes: int
    fraction: float
    kv_cache_cap_bytes: int | None


def memory_limit(target: Target, cache_config: "CacheConfig", envs: MetalEnvs, model_bytes: int) -> MemoryLimit:
    """Apply the precedence: VLLM_METAL_MEMORY_FRACTION, --gpu-memory-utilization if passed, a default.

    On a CPU the total is what the system could hand out before the weights were loaded.
    """
    default = type(cache_config).__dataclass_fields__["gpu_memory_utilization"].default
    passed = cache_config.gpu_memory_utilization
    fraction = envs.memory_fraction
    if fraction is None and passed != getattr(default, "default", default):
        fraction = passed
    if target != "cpu":
        return MemoryLimit(device.total_memory_bytes(target), fraction or DEFAULT_FRACTION, None)
    free = device.free_memory_bytes() + model_bytes
    if fraction is None:
        return MemoryLimit(free, CPU_FRACTION, CPU_KV_CACHE_BYTES)
    return MemoryLimit(free, fraction, None)


def measure_step_bytes(
    model: PagedModel, specs: Mapping[str, KVCacheSpec], *, num_tokens: int, num_reqs: int, target: Target
) -> int:
    """Run one worst-case step on a throw-away cache and return the memory that it needed at its peak.

    The step is one prompt of ``num_tokens`` rows, and the head on ``num_reqs`` rows as sampling sees it: in
    float32,
    once as logits, once sorted.
    """
    rows = min(num_tokens, PROFILE_ROWS_ON_CPU) if target == "cpu" else num_tokens
    pool, metadata = _profile_cache(specs, rows)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    hidden = model.forward(mx.zeros((rows,), mx.int32), metadata, pool)
    mx.eval(hidden, pool.arrays())
    step_bytes = max(0, mx.get_peak_memory() - before)
    del hidden, pool
    head_bytes = 3 * num_reqs * model.vocab_size * mx.float32.size
    mx.clear_cache()
    return step_bytes * num_tokens // rows + head_bytes


def _profile_cache(specs: Mapping[str, KVCacheSpec], num_tokens: int) -> tuple[KVCachePool, list[AttentionMetadata]]:
    """A cache just large enough for one request of ``num_tokens``; layers share a group where blocks allow it."""
    kinds: dict[tuple[int, bool], dict[str, KVCacheSpec]] = {}
    for name, spec in specs.items():
        kinds.setdefault((spec.block_size, isinstance(spec, RecurrentStateSpec)), {})[name] = spec
    groups = [CacheGroup(tuple(layers), tuple(layers.values())) for layers in kinds.values()]
    counts = [-(-num_tokens // group.block_size) for group in groups]
    pool = KVCachePool(CacheLayout.from_groups(groups, 1 + sum(counts)))
    firsts = np.cumsum([1, *counts[:-1]])
    starts = np.array([0, num_tokens], np.int32)
    metadata = [
        AttentionMetadata.build(
            starts,
            starts[1:],
            np.arange(first, first + count, dtype=np.int32)[None],
            group.block_size,
            keeps_rows=group.keeps_rows,
        )
        for group, first, count in zip(groups, firsts, counts, strict=True)
    ]
    return pool, metadata
