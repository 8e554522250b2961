"""Which checkpoints are converted, which are mlx-lm's own affair, and which are refused."""

from typing import Any

import mlx.core as mx
import pytest

from metal_models import MetalModelsError
from metal_models.weights import FORMATS, config_dtype, format_of


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
        {"quantization_config": {"group_size": 64, "bits": 4}},
        {"quantization_config": {"group_size": 64, "bits": 4, "quant_method": "mlx"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {"quant_method": "bitnet"}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}},
        {"model_type": "kimi_k3", "quantization_config": {"quant_method": "compressed-tensors"}},
    ],
)
def test_mlx_lm_loads(config: dict[str, Any]) -> None:
    assert format_of({"model_type": "llama"} | config) is None


@pytest.mark.parametrize("method", sorted(set(FORMATS) - {"modelopt", "modelopt_fp4"}))
def test_converted(method: str) -> None:
    settings = {"quant_method": method}
    for config in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        found = format_of(config)
        assert found is not None
        assert found.method == method


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "torchao", None])
def test_others_are_refused_by_name(method: str | None) -> None:
    with pytest.raises(MetalModelsError, match=rf"awq, .*, got {method!r}"):
        format_of({"quantization_config": {"quant_method": method, "load_in_4bit": True}})


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "COMPRESSED_TENSORS"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
)
def test_other_spellings(config: dict[str, Any]) -> None:
    found = format_of(config)
    assert found is not None
    assert found.method == "compressed-tensors"


@pytest.mark.parametrize(
    ("settings", "module", "left_out"),
    [
        ({}, "lm_head", True),
        ({"lm_head": True}, "lm_head", False),
        ({}, "model.layers.1.mlp.up_proj", False),
        ({"ignore": ["model.layers.1.mlp.up_proj"]}, "model.layers.1.mlp.up_proj", True),
        ({"modules_to_not_convert": ["model.layers.1"]}, "model.layers.1.mlp.up_proj", True),
        ({"modules_to_not_convert": ["model.layers.1"]}, "model.layers.11.mlp.up_proj", False),
        ({"modules_to_not_convert": ["gate"]}, "model.layers.1.mlp.gate", True),
        ({"modules_to_not_convert": ["gate"]}, "model.layers.1.mlp.gate_proj", False),
        ({"ignore": ["re:.*experts.*"]}, "model.layers.1.mlp.switch_mlp.up_proj", True),
    ],
)
def test_modules_that_settings_leave_out(settings: dict[str, Any], module: str, left_out: bool) -> None:
    found = format_of({"quantization_config": {"quant_method": "gptq"} | settings})
    assert found is not None
    assert found.leaves_out(module) == left_out


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, mx.bfloat16),
        ({"torch_dtype": "float16"}, mx.float16),
        ({"dtype": "torch.float32"}, mx.float32),
        ({"text_config": {"dtype": "float16"}}, mx.float16),
    ],
)
def test_dtype_of_a_config(config: dict[str, Any], dtype: mx.Dtype) -> None:
    assert config_dtype(config) == dtype
