"""GPU functions on mx.array for serving LLMs: paged attention, cache writes and their plain-MLX twins."""

from metal_kernels.blas import prefer_fast_blas
from metal_kernels.command_buffers import allow_large_command_buffers

# Both only work before mlx.core is imported.
CPU_BLAS = prefer_fast_blas()
allow_large_command_buffers()

# ruff: noqa: E402
from metal_kernels import reference
from metal_kernels.copy_blocks import copy_blocks
from metal_kernels.decode_attention import decode_attention
from metal_kernels.decode_plan import DecodePlan, DecodeSizes, pack_decode, plan_decode
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError
from metal_kernels.experts import choose_experts, expert_linear, expert_silu_and_mul, serves_experts
from metal_kernels.fused_linear import fused_linear, head_linear
from metal_kernels.fused_rows import add_rms_norm, silu_and_mul
from metal_kernels.gated_delta_rows import GatedDeltaRows, HeadPart
from metal_kernels.gather_kv_cache import gather_kv_cache
from metal_kernels.host_memory import keep_with_host
from metal_kernels.latent import concat_and_cache_mla, mla_attention, read_pages
from metal_kernels.latent_decode import latent_decode, latent_rope_and_cache
from metal_kernels.latent_projections import LatentProjections
from metal_kernels.linear_weights import LinearWeights
from metal_kernels.mamba2_rows import Mamba2Rows
from metal_kernels.paged_attention import paged_attention
from metal_kernels.quantized_cache import (
    quantized_gather_kv_cache,
    quantized_paged_attention,
    quantized_reshape_and_cache,
)
from metal_kernels.ragged import RaggedBatch
from metal_kernels.recurrent_decode import gated_delta_decode, mamba2_decode, short_conv_decode
from metal_kernels.reshape_and_cache import reshape_and_cache
from metal_kernels.rope_and_attend import rope_and_attend
from metal_kernels.rope_and_cache import rope_and_cache
from metal_kernels.row_format import ElementFormat, RowFormat
from metal_kernels.sampling import adjust_logits, pack_sampling_rules, sample_rows, serves_sampling
from metal_kernels.stacked_weights import StackedWeights
from metal_kernels.write_and_attend import write_and_attend

__all__ = [
    # the library behind matrix products on a CPU, or why it is MLX's own
    "CPU_BLAS",
    # what a step looks like
    "RaggedBatch",
    # attention and its cache
    "paged_attention",
    "reshape_and_cache",
    "copy_blocks",
    "gather_kv_cache",
    # latent attention and its cache
    "mla_attention",
    "LatentProjections",
    "concat_and_cache_mla",
    "read_pages",
    # a cache of quantised rows
    "RowFormat",
    "ElementFormat",
    "quantized_paged_attention",
    "quantized_reshape_and_cache",
    "quantized_gather_kv_cache",
    # decode steps that are compiled once
    "DecodePlan",
    "DecodeSizes",
    "plan_decode",
    "pack_decode",
    "decode_attention",
    "write_and_attend",
    "latent_decode",
    # one token of recurrent layers
    "GatedDeltaRows",
    "HeadPart",
    "gated_delta_decode",
    "Mamba2Rows",
    "mamba2_decode",
    "short_conv_decode",
    # experts on few rows
    "choose_experts",
    "expert_silu_and_mul",
    "expert_linear",
    "serves_experts",
    # between the matmuls
    "rope_and_cache",
    "rope_and_attend",
    "latent_rope_and_cache",
    "add_rms_norm",
    "silu_and_mul",
    # a matmul with what is around it
    "fused_linear",
    "head_linear",
    "LinearWeights",
    "StackedWeights",
    # from logits to tokens
    "adjust_logits",
    "sample_rows",
    "pack_sampling_rules",
    "serves_sampling",
    # where it runs
    "target",
    "keep_with_host",
    "reference",
    # errors
    "MetalKernelsError",
]
