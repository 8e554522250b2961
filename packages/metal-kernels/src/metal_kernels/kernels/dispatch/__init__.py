"""Which kernel variant serves a call, or why none does: a module for the verdict on each kernel."""

from metal_kernels.kernels.dispatch.decode import (
    DecodeVariant,
    MatrixVariant,
    decode_kernel,
    decode_variant,
    rope_decode_kernel,
    write_decode_kernel,
)
from metal_kernels.kernels.dispatch.expert_matrix import ExpertMatrixVariant, expert_matrix_kernel
from metal_kernels.kernels.dispatch.experts import ExpertVariant, expert_kernel, routing_kernel
from metal_kernels.kernels.dispatch.latent import (
    ExpandedPrefill,
    LatentPrompts,
    LatentVariant,
    expanded_prefill,
    mla_decode_kernel,
)
from metal_kernels.kernels.dispatch.linear import (
    LinearVariant,
    head_linear_kernel,
    linear_kernel,
    linear_variant,
)
from metal_kernels.kernels.dispatch.prefill import (
    GatheredPrefill,
    PrefillVariant,
    PrefillWork,
    gathered_prefill,
    prefill_kernel,
)
from metal_kernels.kernels.dispatch.quantized import (
    QuantizedVariant,
    quantized_decode_kernel,
    quantized_write_kernel,
)
from metal_kernels.kernels.dispatch.recurrent import (
    GatedDeltaVariant,
    MemoryVariant,
    gated_delta_kernel,
    mamba2_kernel,
    short_conv_kernel,
)
from metal_kernels.kernels.dispatch.rows import PageKernels, RowKernels, page_kernels, row_kernels
from metal_kernels.kernels.dispatch.sampling import SampleVariant, sample_kernel
from metal_kernels.kernels.dispatch.verdict import BLOCK_SIZES, FLOAT_DTYPES, HEAD_SIZES, Accepted, Rejected

__all__ = [
    "Accepted",
    "BLOCK_SIZES",
    "DecodeVariant",
    "ExpandedPrefill",
    "ExpertMatrixVariant",
    "ExpertVariant",
    "FLOAT_DTYPES",
    "GatedDeltaVariant",
    "GatheredPrefill",
    "HEAD_SIZES",
    "LatentPrompts",
    "LatentVariant",
    "LinearVariant",
    "MatrixVariant",
    "PageKernels",
    "PrefillVariant",
    "PrefillWork",
    "QuantizedVariant",
    "Rejected",
    "RowKernels",
    "SampleVariant",
    "decode_kernel",
    "decode_variant",
    "expanded_prefill",
    "expert_kernel",
    "MemoryVariant",
    "expert_matrix_kernel",
    "gated_delta_kernel",
    "mamba2_kernel",
    "gathered_prefill",
    "head_linear_kernel",
    "linear_kernel",
    "linear_variant",
    "mla_decode_kernel",
    "page_kernels",
    "prefill_kernel",
    "quantized_decode_kernel",
    "quantized_write_kernel",
    "rope_decode_kernel",
    "routing_kernel",
    "row_kernels",
    "sample_kernel",
    "short_conv_kernel",
    "write_decode_kernel",
]
