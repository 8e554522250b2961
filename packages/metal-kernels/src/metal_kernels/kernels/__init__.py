"""The kernels: one body each that runs on Metal and, through a short prelude, on CUDA.

Cache writes happen in place. The array that a write returns as order token is a real output of its kernel, and every
kernel that reads the cache takes it as an input: that alone orders the two, within a step and between steps.
"""

from metal_kernels.kernels.blocks import copy_blocks, gather_blocks, gather_halves
from metal_kernels.kernels.cache_write import reshape_and_cache
from metal_kernels.kernels.dispatch import (
    Accepted,
    DecodeVariant,
    ExpandedPrefill,
    ExpertMatrixVariant,
    ExpertVariant,
    GatedDeltaVariant,
    GatheredPrefill,
    LatentPrompts,
    LatentVariant,
    LinearVariant,
    MatrixVariant,
    MemoryVariant,
    PrefillVariant,
    PrefillWork,
    QuantizedVariant,
    Rejected,
    SampleVariant,
    decode_kernel,
    expanded_prefill,
    expert_kernel,
    expert_matrix_kernel,
    gated_delta_kernel,
    gathered_prefill,
    head_linear_kernel,
    linear_kernel,
    mamba2_kernel,
    mla_decode_kernel,
    page_kernels,
    prefill_kernel,
    quantized_decode_kernel,
    quantized_write_kernel,
    rope_decode_kernel,
    routing_kernel,
    row_kernels,
    sample_kernel,
    short_conv_kernel,
    write_decode_kernel,
)
from metal_kernels.kernels.expert_matrix import expert_matrix
from metal_kernels.kernels.experts import choose_experts, expert_linear, expert_silu_and_mul
from metal_kernels.kernels.fused_linear import fused_linear, head_linear
from metal_kernels.kernels.fused_rows import add_rms_norm, silu_and_mul
from metal_kernels.kernels.latent_rope_and_cache import latent_rope_and_cache
from metal_kernels.kernels.mamba2_decode import mamba2_decode
from metal_kernels.kernels.mla_decode import mla_decode
from metal_kernels.kernels.mla_prefill import mla_prefill
from metal_kernels.kernels.mla_step import mla_attention
from metal_kernels.kernels.own_pages import own_pages
from metal_kernels.kernels.paged_decode import paged_decode, rope_decode, write_decode
from metal_kernels.kernels.prefill import prefill
from metal_kernels.kernels.prefill_gathered import prefill_gathered
from metal_kernels.kernels.prefill_tiled import prefill_tiled
from metal_kernels.kernels.quantized_cache_write import quantized_reshape_and_cache
from metal_kernels.kernels.quantized_decode import quantized_decode
from metal_kernels.kernels.quantized_step import quantized_paged_attention
from metal_kernels.kernels.recurrent_decode import gated_delta_decode, short_conv_decode
from metal_kernels.kernels.rope_and_cache import rope_and_cache
from metal_kernels.kernels.sampling import adjust_logits, sample_rows
from metal_kernels.kernels.self_test import move_pages, writes_in_place
from metal_kernels.kernels.states import gather_states, move_states, scatter_states
from metal_kernels.kernels.step import paged_attention

__all__ = [
    "Accepted",
    "DecodeVariant",
    "ExpandedPrefill",
    "ExpertMatrixVariant",
    "ExpertVariant",
    "GatedDeltaVariant",
    "GatheredPrefill",
    "LatentPrompts",
    "LatentVariant",
    "LinearVariant",
    "MatrixVariant",
    "MemoryVariant",
    "PrefillVariant",
    "PrefillWork",
    "QuantizedVariant",
    "Rejected",
    "SampleVariant",
    "add_rms_norm",
    "adjust_logits",
    "choose_experts",
    "copy_blocks",
    "decode_kernel",
    "expanded_prefill",
    "expert_kernel",
    "expert_linear",
    "expert_matrix",
    "expert_matrix_kernel",
    "expert_silu_and_mul",
    "fused_linear",
    "gated_delta_decode",
    "gated_delta_kernel",
    "gather_blocks",
    "gather_halves",
    "gathered_prefill",
    "gather_states",
    "head_linear",
    "head_linear_kernel",
    "linear_kernel",
    "latent_rope_and_cache",
    "mamba2_decode",
    "mamba2_kernel",
    "mla_attention",
    "mla_decode",
    "mla_decode_kernel",
    "mla_prefill",
    "move_pages",
    "move_states",
    "own_pages",
    "page_kernels",
    "paged_attention",
    "paged_decode",
    "prefill",
    "prefill_gathered",
    "prefill_kernel",
    "prefill_tiled",
    "quantized_decode",
    "quantized_decode_kernel",
    "quantized_paged_attention",
    "quantized_reshape_and_cache",
    "quantized_write_kernel",
    "reshape_and_cache",
    "rope_and_cache",
    "rope_decode",
    "rope_decode_kernel",
    "routing_kernel",
    "row_kernels",
    "sample_kernel",
    "sample_rows",
    "short_conv_decode",
    "short_conv_kernel",
    "silu_and_mul",
    "scatter_states",
    "write_decode",
    "write_decode_kernel",
    "writes_in_place",
]
