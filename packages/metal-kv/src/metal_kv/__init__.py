"""KV-cache memory for MLX: specs, layouts, pools, block tables and a memory budget."""

import metal_kernels  # noqa: F401  first: chooses the BLAS before MLX is imported
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.block_pool import BlockPool, SequenceBlocks
from metal_kv.block_table import BlockTable, kernel_block_table
from metal_kv.budget import MemoryBudget
from metal_kv.errors import BlockTableError, MetalKVError, NotEnoughMemoryError, OutOfBlocksError, SpecError
from metal_kv.grouping import group_layers
from metal_kv.hybrid import unify_page_sizes
from metal_kv.layer_cache import LayerCache
from metal_kv.layout import CacheGroup, CacheLayout, LayerPlace, bytes_per_block, max_blocks_per_request
from metal_kv.pool import KVCachePool
from metal_kv.prefix_tree import Match, PrefixTree
from metal_kv.quantization import quantize_specs
from metal_kv.recurrent_state import StateBlocks, state_blocks
from metal_kv.saved_states import SavedStates
from metal_kv.slot_mapping import slot_mapping, token_positions
from metal_kv.spec import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    LatentSpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
    with_block_size,
)

__all__ = [
    # what a layer keeps
    "KVCacheSpec",
    "AttentionSpec",
    "FullAttentionSpec",
    "SlidingWindowSpec",
    "LatentSpec",
    "RecurrentStateSpec",
    "with_block_size",
    "quantize_specs",
    "unify_page_sizes",
    # where it lies
    "CacheGroup",
    "group_layers",
    "CacheLayout",
    "LayerPlace",
    "bytes_per_block",
    "max_blocks_per_request",
    "KVCachePool",
    "LayerCache",
    # which rows a step writes and reads
    "BlockTable",
    "kernel_block_table",
    "AttentionMetadata",
    "slot_mapping",
    "SavedStates",
    "StateBlocks",
    "state_blocks",
    "token_positions",
    # how much there is, and who has it
    "MemoryBudget",
    "BlockPool",
    "SequenceBlocks",
    "PrefixTree",
    "Match",
    # errors
    "MetalKVError",
    "SpecError",
    "BlockTableError",
    "OutOfBlocksError",
    "NotEnoughMemoryError",
]
