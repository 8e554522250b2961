"""The names a user may import; the twins have the same ones and the same signatures."""

import inspect

import pytest

import metal_kernels


def test_exported_names():
    assert sorted(metal_kernels.__all__) == [
        "CPU_BLAS",
        "DecodePlan",
        "DecodeSizes",
        "ElementFormat",
        "GatedDeltaRows",
        "HeadPart",
        "LatentProjections",
        "LinearWeights",
        "Mamba2Rows",
        "MetalKernelsError",
        "RaggedBatch",
        "RowFormat",
        "StackedWeights",
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
        "gather_kv_cache",
        "head_linear",
        "keep_with_host",
        "latent_decode",
        "latent_rope_and_cache",
        "mamba2_decode",
        "mla_attention",
        "pack_decode",
        "pack_sampling_rules",
        "paged_attention",
        "plan_decode",
        "quantized_gather_kv_cache",
        "quantized_paged_attention",
        "quantized_reshape_and_cache",
        "read_pages",
        "reference",
        "reshape_and_cache",
        "rope_and_attend",
        "rope_and_cache",
        "sample_rows",
        "serves_experts",
        "serves_sampling",
        "short_conv_decode",
        "silu_and_mul",
        "target",
        "write_and_attend",
    ]


@pytest.mark.parametrize("name", metal_kernels.reference.__all__)
def test_twins_have_the_same_signature(name):
    public, twin = getattr(metal_kernels, name), getattr(metal_kernels.reference, name)
    assert str(inspect.signature(public)) == str(inspect.signature(twin))
