"""vLLM's cache specs and configuration in terms of metal_kv, and back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import torch
from vllm.v1 import kv_cache_interface as vllm_kv

import metal_kv
from vllm_metal_plugin.errors import UnsupportedConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_TORCH_DTYPES = {
    mx.float32: torch.float32,
    mx.float16: torch.float16,
    mx.bfloat16: torch.bfloat16,
    mx.uint8: torch.uint8,
}
_MLX_DTYPES = {dtype: mlx for mlx, dtype in _TORCH_DTYPES.items()}


def to_mlx_dtype(dtype: torch.dtype) -> mx.Dtype:
    """MLX's name for a torch dtype."""
    return _MLX_DTYPES[dtype]


def to_vllm_specs(specs: Mapping[str, metal_kv.KVCacheSpec]) -> dict[str, vllm_kv.KVCacheSpec]:
    """What the scheduler must know about each layer's cache."""
    return {name: _to_vllm(name, spec) for name, spec in specs.items()}


def _to_vllm(name: str, spec: metal_kv.KVCacheSpec) -> vllm_kv.KVCacheSpec:
    match spec:
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
    """The cache that vLLM planned: its groups, with the block sizes it chose for them.

    Args:
        config: vLLM's plan for this worker.
        specs: The model's own specs by layer name.
    """
    groups = [_to_group(group, specs) for group in config.kv_cache_groups]
    return metal_kv.CacheLayout.from_groups(groups, config.num_blocks)


def planned_groups(vllm_config: "VllmConfig", specs: Mapping[str, metal_kv.KVCacheSpec]) -> list[metal_kv.CacheGroup]:
    """The groups that vLLM will make of the layers once it knows how much memory there is."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

    return [_to_group(group, specs) for group in get_kv_cache_groups(vllm_config, to_vllm_specs(specs))]


def _to_group(group: vllm_kv.KVCacheGroupSpec, specs: Mapping[str, metal_kv.KVCacheSpec]) -> metal_kv.CacheGroup:
    block_size = group.kv_cache_spec.block_size
    return metal_kv.CacheGroup(
        tuple(group.layer_names),
        tuple(metal_kv.with_block_size(specs[name], block_size) for name in group.layer_names),
    )
