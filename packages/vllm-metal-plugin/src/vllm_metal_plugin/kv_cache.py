"""vLLM's cache specs and configuration in terms of metal_kv, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import torch
from vllm.v1 import kv_cache_interface as vllm_kv

import metal_kv
from vllm_metal_plugin.errors import UnsupportedConfigError
from vllm_metal_plugin.log import metal_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = metal_logger(__name__)

_TORCH_DTYPES = {
    mx.float32: torch.float32,
    mx.float16: torch.float16,
    mx.bfloat16: torch.bfloat16,
    mx.uint8: torch.uint8,
    mx.int64: torch.int64,
}
KERNEL_BLOCK_SIZES = (32, 16, 8)
_MLX_DTYPES = {dtype: mlx for mlx, dtype in _TORCH_DTYPES.items()}


def to_mlx_dtype(dtype: torch.dtype) -> mx.Dtype:
    """MLX's name for a torch dtype."""
    return _MLX_DTYPES[dtype]


def plan_states(
    specs: Mapping[str, metal_kv.KVCacheSpec], vllm_config: "VllmConfig"
) -> dict[str, metal_kv.KVCacheSpec]:
    """Make pages of keys and values as large as pages of recurrent states, if there are any, so that they share bytes.

    With prefix caching a request keeps a state for every block that it fills, else one state in one block. Where all
    blocks are equally long, the last step of a prompt leaves the state at the end of the last full block as well: the
    prompt needs no other step for it. The block size that follows is written into vLLM's cache configuration.

    Args:
        specs: The model's own specs by layer name.
        vllm_config: Of this worker.
    """
    states = [name for name, spec in specs.items() if isinstance(spec, metal_kv.RecurrentStateSpec)]
    if not states:
        return dict(specs)
    cache = vllm_config.cache_config
    aligned = cache.mamba_cache_mode == "align"
    planned = metal_kv.unify_page_sizes(
        specs,
        state_block_size=None if aligned else vllm_config.model_config.max_model_len,
        blocks_per_request=2 if aligned else 1,
    )
    if aligned and _keeps_states_inside_steps(planned, vllm_config):
        for name in states:
            planned[name] = replace(planned[name], blocks_per_request=3)  # type: ignore[call-arg]
    rows = [spec.block_size for name, spec in planned.items() if name not in states]
    cache.block_size = min(rows, default=planned[states[0]].block_size)
    cache.mamba_block_size = planned[states[0]].block_size
    logger.info(
        "%d of %d layers keep a recurrent state of %d bytes; pages of %d bytes hold a state or the keys and values of "
        "%s tokens; prefix caching %s",
        len(states),
        len(specs),
        sum(specs[states[0]].state_bytes),  # type: ignore[attr-defined]
        planned[states[0]].page_size_bytes,
        "/".join(str(size) for size in sorted(set(rows))) or "no",
        "keeps the state at the end of each block" if aligned else "is off",
    )
    return planned


def _keeps_states_inside_steps(planned: Mapping[str, metal_kv.KVCacheSpec], vllm_config: "VllmConfig") -> bool:
    """Tell whether the state that vLLM wants of a prompt's last step is always one at the end of a block."""
    speculation = vllm_config.speculative_config
    return (
        len({spec.block_size for spec in planned.values()}) == 1
        and vllm_config.cache_config.prefix_match_unit is None
        and (speculation is None or not speculation.use_eagle_block_drop())
    )


def state_bytes(specs: Mapping[str, metal_kv.KVCacheSpec]) -> int:
    """Bytes of all recurrent states of one request."""
    return sum(sum(spec.state_bytes) for spec in specs.values() if isinstance(spec, metal_kv.RecurrentStateSpec))


def to_vllm_specs(
    specs: Mapping[str, metal_kv.KVCacheSpec], vllm_config: "VllmConfig"
) -> dict[str, vllm_kv.KVCacheSpec]:
    """What the scheduler must know about each layer's cache."""
    mamba_cache_mode = vllm_config.cache_config.mamba_cache_mode
    return {name: _to_vllm(name, spec, mamba_cache_mode) for name, spec in specs.items()}


def _to_vllm(name: str, spec: metal_kv.KVCacheSpec, mamba_cache_mode: str) -> vllm_kv.KVCacheSpec:
    match spec:
        case metal_kv.RecurrentStateSpec():
            return vllm_kv.MambaSpec(
                block_size=spec.block_size,
                shapes=spec.shapes,
                dtypes=tuple(_TORCH_DTYPES[dtype] for dtype in spec.dtypes),
                page_size_padded=spec.page_size_padded,
                mamba_cache_mode=mamba_cache_mode,
                num_prefill_checkpoint_blocks=max(0, spec.blocks_per_request - 2),
                prefill_checkpoint_alignment=1 if spec.blocks_per_request > 2 else None,
            )
        case metal_kv.SlidingWindowSpec():
            return vllm_kv.SlidingWindowSpec(**_heads(spec), sliding_window=spec.sliding_window)
        case metal_kv.FullAttentionSpec():
            return vllm_kv.FullAttentionSpec(**_heads(spec))
        case metal_kv.LatentSpec():
            return vllm_kv.MLAAttentionSpec(
                block_size=spec.block_size,
                num_kv_heads=1,
                head_size=spec.latent_size + spec.rope_size,
                dtype=_TORCH_DTYPES[spec.dtype],
            )
        case _:
            raise UnsupportedConfigError(
                f"[kv cache] expected attention layers, got {type(spec).__name__} for {name}. "
                "This kind of layer is not supported in this version."
            )


def _heads(spec: Any) -> dict[str, Any]:
    # Quantised rows: for vLLM one slot that holds all heads, of so many bytes.
    packed = {"num_head_slots": 1, "state_content_bytes": spec.rows.row_bytes} if spec.rows else {}
    return packed | {
        "block_size": spec.block_size,
        "num_kv_heads": spec.num_kv_heads,
        "head_size": spec.head_size,
        "head_size_v": spec.head_size_v or spec.head_size,
        "dtype": _TORCH_DTYPES[mx.uint8 if spec.rows else spec.dtype],
    }


def to_layout(config: vllm_kv.KVCacheConfig, specs: Mapping[str, metal_kv.KVCacheSpec]) -> metal_kv.CacheLayout:
    """The cache that vLLM planned.

    Args:
        config: vLLM's plan for this worker.
        specs: The model's own specs by layer name.
    """
    return metal_kv.CacheLayout.from_groups(to_groups(config, specs), config.num_blocks)


def to_groups(config: vllm_kv.KVCacheConfig, specs: Mapping[str, metal_kv.KVCacheSpec]) -> list[metal_kv.CacheGroup]:
    """The groups of vLLM's plan, with the block sizes it chose for them."""
    return [_to_group(group, specs) for group in config.kv_cache_groups]


def planned_groups(vllm_config: "VllmConfig", specs: Mapping[str, metal_kv.KVCacheSpec]) -> list[metal_kv.CacheGroup]:
    """The groups that vLLM will make of the layers once it knows how much memory there is."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

    return [_to_group(group, specs) for group in get_kv_cache_groups(vllm_config, to_vllm_specs(specs, vllm_config))]


def _to_group(group: vllm_kv.KVCacheGroupSpec, specs: Mapping[str, metal_kv.KVCacheSpec]) -> metal_kv.CacheGroup:
    block_size = group.kv_cache_spec.block_size
    layer_specs = tuple(metal_kv.with_block_size(specs[name], block_size) for name in group.layer_names)
    return metal_kv.CacheGroup(tuple(group.layer_names), layer_specs, _kernel_block_size(layer_specs))


def _kernel_block_size(specs: Sequence[metal_kv.KVCacheSpec]) -> int | None:
    """The largest block that kernels know and that divides a larger one; None where no block has to be cut."""
    block_size = specs[0].block_size
    if block_size <= KERNEL_BLOCK_SIZES[0] or any(isinstance(spec, metal_kv.RecurrentStateSpec) for spec in specs):
        return None
    return next((size for size in KERNEL_BLOCK_SIZES if block_size % size == 0), None)


def log_block_translation(groups: Sequence[metal_kv.CacheGroup]) -> None:
    """Say which of vLLM's blocks kernels see as several."""
    for group in groups:
        if group.kernel_block_size is not None:
            logger.info(
                "Block-size translation: vLLM block_size=%d -> kernel block_size=%d (ratio=%d), no copy",
                group.block_size,
                group.kernel_block_size,
                group.block_size // group.kernel_block_size,
            )
