"""The kernels' twins in plain MLX: same names and signatures; the specification, and the path on a CPU.

The twins are functional: a written cache is a *new* array. Its memory is the old array's when nothing else
references that one and its last use has finished executing; otherwise MLX copies the whole cache. So replace
the old array at once, keep no view of it, and evaluate a step before building the next one.
"""

from metal_kernels.reference.attention import paged_attention
from metal_kernels.reference.cache import copy_blocks, gather_kv_cache, reshape_and_cache
from metal_kernels.reference.decode import decode_attention
from metal_kernels.reference.experts import choose_experts, expert_linear, expert_silu_and_mul
from metal_kernels.reference.fused import add_rms_norm, rope_and_cache, silu_and_mul
from metal_kernels.reference.latent import (
    concat_and_cache_mla,
    latent_decode,
    latent_rope_and_cache,
    mla_attention,
)
from metal_kernels.reference.linear import fused_linear, head_linear
from metal_kernels.reference.quantized import (
    quantized_gather_kv_cache,
    quantized_paged_attention,
    quantized_reshape_and_cache,
)
from metal_kernels.reference.recurrent import gated_delta_decode, mamba2_decode, short_conv_decode
from metal_kernels.reference.sampling import adjust_logits, sample_rows

__all__ = [
    "add_rms_norm",
    "adjust_logits",
    "choose_experts",
    "concat_and_cache_mla",
    "copy_blocks",
    "decode_attention",
    "expert_linear",
    "expert_silu_and_mul",
    "fused_linear",
    "gated_delta_decode",
    "mamba2_decode",
    "gather_kv_cache",
    "head_linear",
    "latent_decode",
    "latent_rope_and_cache",
    "mla_attention",
    "paged_attention",
    "quantized_gather_kv_cache",
    "quantized_paged_attention",
    "quantized_reshape_and_cache",
    "reshape_and_cache",
    "rope_and_cache",
    "sample_rows",
    "short_conv_decode",
    "silu_and_mul",
]
