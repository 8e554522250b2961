"""ModelOpt's checkpoints, packed here as NVIDIA describes them."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_models import MetalModelsError, load
from metal_models.capacity import converted_weight_bytes
from metal_models.checkpoint import read_config

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def nvfp4(weight: np.ndarray, factor: float) -> Any:
    groups = weight.reshape(weight.shape[0], -1, 16)
    scales = mx.to_fp8(mx.array(np.abs(groups).max(-1) / 6 / factor))
    wide = np.array(mx.from_fp8(scales, mx.float32)) * np.float32(factor)
    ratios = groups / np.maximum(wide, 1e-9)[..., None]
    codes = np.abs(np.abs(ratios)[..., None] - VALUES).argmin(-1)
    values = VALUES[codes] * np.sign(ratios) * wide[..., None]
    codes = (codes | (ratios < 0) << 3).reshape(weight.shape).astype(np.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    parts = {".weight": mx.array(packed), ".weight_scale": scales, ".weight_scale_2": mx.array(np.float32(factor))}
    return parts | {".input_scale": mx.ones(())}, values.reshape(weight.shape)


def test_nvfp4_with_a_factor(checkpoints: Any) -> None:
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    paths = checkpoints.pair(settings, lambda _, weight: nvfp4(weight, 0.0123))
    model = checkpoints.same(*paths)
    assert model.module.layers[0].mlp.up_proj.mode == "nvfp4"
    planned = converted_weight_bytes(read_config(paths[0]), dtype=mx.float32)
    assert planned == pytest.approx(model.nbytes, rel=0.02)


def test_a_layer_that_cannot_stay_packed(checkpoints: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An embedding cannot have a factor: everything becomes floats, and the log says so."""
    config, tensors = checkpoints.model()
    stored: dict[str, Any] = {}
    for key, array in tensors.items():
        parts = {".weight": mx.array(array)}
        if key.endswith(("_proj.weight", "embed_tokens.weight")):
            parts, tensors[key] = nvfp4(array, 0.0123)
        stored |= {key.removesuffix(".weight") + ending: part for ending, part in parts.items()}
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    quantised = checkpoints.write("quantised", config | {"quantization_config": settings}, stored)
    model = checkpoints.same(quantised, checkpoints.write("floats", config, tensors))
    assert not hasattr(model.module.layers[0].mlp.up_proj, "bits")
    assert "held as floats" in caplog.text
    assert "embed_tokens" in caplog.text


def test_settings_in_a_file_of_their_own(checkpoints: Any) -> None:
    quantised, floats = checkpoints.pair({}, lambda _, weight: nvfp4(weight, 0.5))
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (quantised / "hf_quant_config.json").write_text(json.dumps(settings))
    checkpoints.same(quantised, floats)


def test_fp8(checkpoints: Any) -> None:
    def fp8(_: str, weight: np.ndarray) -> Any:
        scale = np.abs(weight).max() / np.float32(448)
        codes = mx.to_fp8(mx.array(weight / scale))
        return {".weight": codes, ".weight_scale": mx.array(scale)}, np.array(mx.from_fp8(codes, mx.float32)) * scale

    settings = {"quant_method": "modelopt", "quant_algo": "FP8"}
    checkpoints.same(*checkpoints.pair(settings, fp8), tolerance=1e-6)


def test_other_algorithms_are_refused(checkpoints: Any) -> None:
    path, _ = checkpoints.pair(
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, lambda _, weight: nvfp4(weight, 0.5)
    )
    with pytest.raises(MetalModelsError, match="W4A8_AWQ"):
        load(path)
