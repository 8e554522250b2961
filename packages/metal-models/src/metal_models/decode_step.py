"""Steps in which every request has one row: a compiled graph for each bucket of sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels import DecodePlan, DecodeSizes, kernels, pack_decode, rope_and_attend, target
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.layer_cache import LayerCache
from metal_kv.pool import KVCachePool
from metal_kv.spec import AttentionSpec
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.step_memory import BUCKETS, MIN_ELEMENTS, StepMemory, bucket, on_device

# Keys of a range at least: on CUDA the launch that joins two ranges keeps the host busier than it saves the device.
_MIN_RANGE = {"metal": 256, "cuda": 512, "cpu": 256}


@dataclass(frozen=True)
class _PlanKey:
    """What layers that share a decode plan have in common."""

    group: int
    window: int | None
    simdgroups_per_range: int
    block_size: int


@dataclass(frozen=True)
class _StepSizes:
    """What one compiled graph is for: padded requests, and the sizes of every plan."""

    reqs: int
    plans: tuple[tuple[_PlanKey, DecodeSizes], ...]


class DecodeStep:
    """A decode program bound to the layers of a pool.

    Args:
        program: The model's layers.
        caches: The pool's layers, in the same order.
        compiled: Whether steps are compiled; uncompiled, they run on any device, through the kernels' twins.
        few_rows: Steps of so many rows at most are computed with norms, activations and sums in the linear layers.
    """

    def __init__(
        self, program: DecodeProgram, caches: Sequence[LayerCache], *, compiled: bool, few_rows: int = 0
    ) -> None:
        self._program = program
        self._caches = list(caches)
        self._keys = [_plan_key(cache, layer.q_heads) for cache, layer in zip(caches, program.layers, strict=True)]
        self._distinct = tuple(dict.fromkeys(self._keys))
        self._compiled = compiled
        self._few_rows = few_rows
        self._memory = StepMemory()
        self._graphs: dict[_StepSizes, Callable[[mx.array, mx.array], mx.array]] = {}

    def serves(self, metadata: Sequence[AttentionMetadata]) -> bool:
        """Whether every request of the step has one row, and there are not too many."""
        batch = metadata[0].batch
        return 0 < batch.num_reqs <= BUCKETS[-1] and batch.num_decodes == batch.num_reqs

    def __call__(
        self, token_ids: Int32[mx.array, "tokens"], metadata: Sequence[AttentionMetadata]
    ) -> Float[mx.array, "tokens hidden"]:
        """Write the step's keys and values and return its hidden rows, lazily.

        Args:
            token_ids: One id for each request.
            metadata: One per cache group.
        """
        rows = metadata[0].batch.num_reqs
        sizes, packed = _packed(metadata, self._distinct)
        graph = self._graphs.get(sizes)
        if graph is None:
            graph = partial(self._run, sizes)
            graph = self._graphs[sizes] = mx.compile(graph) if self._compiled else graph
        if rows < sizes.reqs:
            token_ids = mx.pad(token_ids, (0, sizes.reqs - rows))
        slot = self._memory.filled(packed)
        slot.reader = hidden = graph(token_ids, slot.array)
        return hidden[:rows] if rows < sizes.reqs else hidden

    def _run(self, sizes: _StepSizes, token_ids: mx.array, packed: mx.array) -> mx.array:
        """Compute a step from its padded ids and the one array that says everything else."""
        packed, slots_size = on_device(packed), max(MIN_ELEMENTS, sizes.reqs)
        positions, at = packed[: sizes.reqs], slots_size
        slots, plans = {}, {}
        for key, plan_sizes in sizes.plans:
            slots[key], at = packed[at : at + slots_size], at + slots_size
            plans[key], at = (
                plan_sizes.unpack(packed[at : at + sum(plan_sizes.elements)]),
                at + sum(plan_sizes.elements),
            )
        cos_sin: dict[Any, mx.array] = {}

        def attend(index: int, layer: DecodeLayer, qkv: mx.array) -> mx.array:
            key, cache = self._keys[index], self._caches[index]
            if layer.rotation not in cos_sin:
                cos_sin[layer.rotation] = layer.rotation.cos_sin(positions)
            return _attend(cache, layer, qkv, cos_sin[layer.rotation], slots[key], plans[key])

        return self._program(token_ids, attend, self._few_rows)


def decode_step(program: DecodeProgram | None, names: Sequence[str], pool: KVCachePool) -> DecodeStep | None:
    """Bind ``program`` to the layers ``names`` of ``pool``; None where kernels do not write in place or attend."""
    if program is None or target() == "cpu" or len(names) != len(program.layers):
        return None
    caches = [pool.layer(name) for name in names]
    if not all(_served(cache, layer.q_heads) for cache, layer in zip(caches, program.layers, strict=True)):
        return None
    return DecodeStep(program, caches, compiled=True, few_rows=program.few_rows)


def _served(cache: LayerCache, q_heads: int) -> bool:
    """Whether kernels write the layer's pages in place and attend over them."""
    pages = cache.kv_cache
    # A compiled step holds the pages themselves, so a view made anew at every access will not do.
    if not isinstance(cache.spec, AttentionSpec) or pages.ndim != 5 or cache.kv_cache is not pages:
        return False
    return kernels.move_pages(pages) and isinstance(_variant(pages, q_heads), kernels.Accepted)


def _variant(
    pages: mx.array, q_heads: int
) -> kernels.Accepted[kernels.DecodeVariant | kernels.MatrixVariant] | kernels.Rejected:
    _, _, block_size, kv_heads, head_size = pages.shape
    return kernels.decode_kernel(target(), pages.dtype, pages.dtype, head_size, block_size, q_heads // kv_heads)


def _plan_key(cache: LayerCache, q_heads: int) -> _PlanKey:
    pages = cache.kv_cache
    window = cache.spec.window if isinstance(cache.spec, AttentionSpec) else None
    decode = _variant(pages, q_heads)
    per_head = decode.variant.parts * decode.variant.simdgroups if isinstance(decode, kernels.Accepted) else 1
    return _PlanKey(cache.group, window, pages.shape[3] * per_head, pages.shape[2])


def _packed(
    metadata: Sequence[AttentionMetadata], keys: Sequence[_PlanKey]
) -> tuple[_StepSizes, Int32[np.ndarray, "elements"]]:
    """Return positions, then slots and plan for each of ``keys``, as one array: it travels to the device at once."""
    batch = metadata[0].batch
    reqs = bucket(batch.num_reqs)
    positions = np.zeros(max(MIN_ELEMENTS, reqs), np.int32)
    positions[: batch.num_reqs] = metadata[0].places.host
    parts, plans = [positions], []
    for key in keys:
        group = metadata[key.group]
        slots = np.full(len(positions), -1, np.int32)
        slots[: batch.num_reqs] = group.slots.host
        sizes, plan = pack_decode(
            group.batch, key.window, key.simdgroups_per_range, reqs, key.block_size, _MIN_RANGE[target()]
        )
        plans.append((key, sizes))
        parts += [slots, plan]
    return _StepSizes(reqs, tuple(plans)), np.concatenate(parts)


def _attend(
    cache: LayerCache, layer: DecodeLayer, qkv: mx.array, cos_sin: mx.array, slots: mx.array, plan: DecodePlan
) -> mx.array:
    """Rotate, write and attend a layer's rows."""
    outputs = []

    def write(pages: mx.array) -> mx.array:
        options: dict[str, Any] = {"scale": layer.scale, "traditional": layer.rotation.traditional}
        if isinstance(layer.q_norm, nn.RMSNorm) and isinstance(layer.k_norm, nn.RMSNorm):
            options |= {"q_norm": layer.q_norm.weight, "k_norm": layer.k_norm.weight, "eps": layer.q_norm.eps}
        attended, written = rope_and_attend(qkv, cos_sin, pages, slots, plan, **options)
        outputs.append(attended)
        return written

    cache.update(write)
    return outputs[0]
