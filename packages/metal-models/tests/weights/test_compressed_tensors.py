"""compressed-tensors checkpoints, packed here as LLM Compressor packs them."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_models import CheckpointError, MetalModelsError, load
from metal_models.capacity import converted_weight_bytes
from metal_models.checkpoint import read_config

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def settings(form: str, **weights: Any) -> dict[str, Any]:
    """Return a quantization_config with one group for all linear layers."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True} | weights}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": {"g": group}}


def words(codes: np.ndarray, bits: int) -> mx.array:
    """Pack codes from 0 along the last axis, as many a word as fit, low ones first."""
    held = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % held))).reshape(codes.shape[0], -1, held)
    packed = (padded.astype(np.uint64) << (bits * np.arange(held, dtype=np.uint64))).sum(-1)
    return mx.array(packed.astype(np.uint32).view(np.int32))


def integers(weight: np.ndarray, bits: int, group: int, symmetric: bool = True) -> tuple[np.ndarray, ...]:
    """Return signed codes, scales, signed zero points and values."""
    parts = weight.reshape(weight.shape[0], -1, group)
    top = 2**bits - 1
    if symmetric:
        scales, zeros = 2 * np.abs(parts).max(-1) / top, np.zeros(parts.shape[:2])
    else:
        low = np.minimum(parts.min(-1), 0)
        scales = (np.maximum(parts.max(-1), 0) - low) / top
        zeros = np.round(-low / scales) - 2 ** (bits - 1)
    least = -(2 ** (bits - 1))
    codes = np.clip(np.round(parts / scales[..., None]) + zeros[..., None], least, -least - 1)
    values = (codes - zeros[..., None]) * scales[..., None].astype(np.float32)
    return codes.reshape(weight.shape), scales.astype(np.float32), zeros, values.reshape(weight.shape)


def packed(weight: np.ndarray, bits: int, group: int, symmetric: bool = True) -> Any:
    codes, scales, zeros, values = integers(weight, bits, group, symmetric)
    middle = 2 ** (bits - 1)
    parts = {
        ".weight_packed": words((codes + middle).astype(np.int64), bits),
        ".weight_scale": mx.array(scales),
        ".weight_shape": mx.array(np.array(weight.shape, np.int64)),
    }
    if not symmetric:
        parts[".weight_zero_point"] = mx.array(np.array(words((zeros + middle).astype(np.int64).T, bits)).T.copy())
    return parts, values


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(4, 32, True), (4, 128, False), (8, 64, True), (8, 64, False), (3, 64, False), (2, 32, True), (6, 128, True)],
)
def test_packed_integers(checkpoints: Any, bits: int, group: int, symmetric: bool) -> None:
    method = settings("pack-quantized", num_bits=bits, strategy="group", group_size=group, symmetric=symmetric)
    paths = checkpoints.pair(method, lambda _, weight: packed(weight, bits, group, symmetric))
    model = checkpoints.same(*paths)
    layer = model.module.layers[0].mlp.gate_proj
    assert (layer.bits, layer.group_size, layer.mode) == (bits, group, "affine")
    assert converted_weight_bytes(read_config(paths[0]), dtype=mx.float32) == pytest.approx(model.nbytes, rel=0.02)


def test_a_scale_for_each_row(checkpoints: Any) -> None:
    method = settings("pack-quantized", strategy="channel")
    paths = checkpoints.pair(method, lambda _, weight: packed(weight, 4, weight.shape[1]))
    assert checkpoints.same(*paths).module.layers[0].mlp.gate_proj.group_size == 128


def test_groups_for_some_layers(checkpoints: Any) -> None:
    """Layers of one kind have 8 bits; the second layer's are left out."""
    method = settings("pack-quantized")
    method["config_groups"]["h"] = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "type": "int"}}
    method["ignore"] += ["re:model.layers.1.*"]

    def mixed(name: str, weight: np.ndarray) -> Any:
        if "layers.1." in name:
            return {".weight": mx.array(weight)}, weight
        return packed(weight, 8 if "down" in name else 4, 64)

    paths = checkpoints.pair(method, mixed)
    model = checkpoints.same(*paths)
    assert converted_weight_bytes(read_config(paths[0]), dtype=mx.float32) == pytest.approx(model.nbytes, rel=0.02)
    layers = model.module.layers
    assert (layers[0].mlp.down_proj.bits, layers[0].mlp.up_proj.bits) == (8, 4)
    assert not hasattr(layers[1].mlp.up_proj, "bits")


@pytest.mark.parametrize("trivial", [True, False])
def test_activation_order(checkpoints: Any, trivial: bool) -> None:
    order = np.arange(4096) if trivial else None

    def shuffled(_: str, weight: np.ndarray) -> Any:
        columns = weight.shape[1]
        places = np.random.default_rng(1).permutation(columns) if order is None else order[:columns]
        parts, values = packed(weight[:, places], 4, 32)
        back = np.argsort(places)
        codes, _, _, _ = integers(weight[:, places], 4, 32)
        parts[".weight_packed"] = words((codes + 8).astype(np.int64)[:, back], 4)
        parts[".weight_g_idx"] = mx.array((back // 32).astype(np.int32))
        return parts, values[:, back]

    method = settings("pack-quantized", strategy="group", group_size=32, actorder="group")
    layer = checkpoints.same(*checkpoints.pair(method, shuffled)).module.layers[0].mlp.up_proj
    assert hasattr(layer, "bits") == trivial


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_shape", [(-1, 1), (-1,)])
def test_eight_bit_integers(checkpoints: Any, symmetric: bool, scale_shape: tuple[int, ...]) -> None:
    def plain(_: str, weight: np.ndarray) -> Any:
        codes, scales, zeros, values = integers(weight, 8, weight.shape[1], symmetric)
        parts = {".weight": mx.array(codes.astype(np.int8)), ".weight_scale": mx.array(scales.reshape(scale_shape))}
        if not symmetric:
            parts[".weight_zero_point"] = mx.array(zeros.astype(np.int8).reshape(scale_shape))
        return parts, values

    method = settings("int-quantized", num_bits=8, strategy="channel", symmetric=symmetric)
    layer = checkpoints.same(*checkpoints.pair(method, plain)).module.layers[0].mlp.gate_proj
    assert (layer.bits, layer.mode) == (8, "affine")


def float8(weight: np.ndarray, rows: int, columns: int) -> Any:
    height, width = weight.shape
    blocks = weight.reshape(height // rows, rows, width // columns, columns)
    scales = np.abs(blocks).max((1, 3)) / np.float32(448)
    wide = scales.repeat(rows, 0).repeat(columns, 1)
    codes = mx.to_fp8(mx.array(weight / wide))
    return {".weight": codes, ".weight_scale": mx.array(scales)}, np.array(mx.from_fp8(codes, mx.float32)) * wide


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_float8(checkpoints: Any, strategy: str) -> None:
    def quantised(_: str, weight: np.ndarray) -> Any:
        sizes = {"tensor": weight.shape, "channel": (1, weight.shape[1]), "block": (64, 32)}
        return float8(weight, *sizes[strategy])

    method = settings("float-quantized", num_bits=8, type="float", strategy=strategy)
    if strategy == "block":
        method["config_groups"]["g"]["weights"]["block_structure"] = [64, 32]
    checkpoints.same(*checkpoints.pair(method, quantised), tolerance=1e-6)


def test_mxfp8(checkpoints: Any) -> None:
    def quantised(_: str, weight: np.ndarray) -> Any:
        codes, scales = mx.quantize(mx.array(weight), mode="mxfp8")
        values = mx.dequantize(codes, scales, mode="mxfp8", dtype=mx.float32)
        return {".weight": codes.view(mx.uint8), ".weight_scale": scales}, np.array(values)

    method = settings("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32)
    assert checkpoints.same(*checkpoints.pair(method, quantised)).module.layers[0].mlp.up_proj.mode == "mxfp8"


def float4(weight: np.ndarray, scales: np.ndarray, group: int) -> tuple[mx.array, np.ndarray]:
    """Return packed codes, and values for scales by group."""
    ratios = weight / scales.repeat(group, 1)
    codes = np.abs(np.abs(ratios)[..., None] - E2M1).argmin(-1)
    values = E2M1[codes] * np.sign(ratios) * scales.repeat(group, 1)
    codes = (codes | (ratios < 0) << 3).astype(np.uint8)
    return mx.array(codes[:, ::2] | codes[:, 1::2] << 4), values


def test_mxfp4(checkpoints: Any) -> None:
    def quantised(_: str, weight: np.ndarray) -> Any:
        largest = np.abs(weight.reshape(weight.shape[0], -1, 32)).max(-1)
        exponents = np.floor(np.log2(largest)) - 2
        codes, values = float4(weight, 2.0**exponents, 32)
        return {".weight_packed": codes, ".weight_scale": mx.array((exponents + 127).astype(np.uint8))}, values

    method = settings("mxfp4-pack-quantized", type="float", strategy="group", group_size=32)
    assert checkpoints.same(*checkpoints.pair(method, quantised)).module.layers[0].mlp.up_proj.mode == "mxfp4"


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_nvfp4(checkpoints: Any, factor: float, model: str) -> None:
    def quantised(_: str, weight: np.ndarray) -> Any:
        largest = np.abs(weight.reshape(weight.shape[0], -1, 16)).max(-1)
        scales = mx.to_fp8(mx.array(largest / 6 * factor))
        codes, values = float4(weight, np.array(mx.from_fp8(scales, mx.float32)) / np.float32(factor), 16)
        parts = {".weight_packed": codes, ".weight_scale": scales, ".weight_global_scale": mx.array([factor])}
        return parts | {".input_global_scale": mx.array([7.0])}, values

    method = settings("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    paths = checkpoints.pair(method, quantised, model)
    mlp = checkpoints.same(*paths).module.layers[0].mlp
    layer = mlp.switch_mlp.up_proj if model == "qwen3_moe" else mlp.up_proj
    assert (layer.mode, layer.bits, layer.group_size) == ("nvfp4", 4, 16)
    exact = load(paths[1]).module.layers[0].self_attn.q_proj.weight
    for options in ({"dtype": mx.float16}, {"dtype": mx.float32, "expand_to_bytes": 1 << 30}):
        weight = load(paths[0], **options).module.layers[0].self_attn.q_proj.weight
        np.testing.assert_allclose(np.array(weight), np.array(exact), rtol=1e-3, atol=1e-5)


def test_experts(checkpoints: Any) -> None:
    paths = checkpoints.pair(
        settings("pack-quantized"), lambda _, weight: packed(weight, 4, 32), "qwen3_moe", moe_intermediate_size=64
    )
    assert checkpoints.same(*paths).module.layers[0].mlp.switch_mlp.down_proj.bits == 4


@pytest.mark.parametrize("missing", [".weight_scale", ".weight_packed"])
def test_missing_tensor_is_named(checkpoints: Any, missing: str) -> None:
    def without(name: str, weight: np.ndarray) -> Any:
        parts, values = packed(weight, 4, 64)
        return {k: v for k, v in parts.items() if k != missing or "0.self_attn.k" not in name}, values

    with pytest.raises(CheckpointError, match=r"\[load\] expected .*layers\.0\.self_attn\.k_proj"):
        load(checkpoints.pair(settings("pack-quantized"), without)[0])


@pytest.mark.parametrize("ending", [".weight_packed", ".weight_scale", ".weight_zero_point"])
def test_misshapen_tensor_is_named(checkpoints: Any, ending: str) -> None:
    def cut(_: str, weight: np.ndarray) -> Any:
        parts, values = packed(weight, 4, 64, symmetric=False)
        return parts | {ending: parts[ending][:-1]}, values

    with pytest.raises(CheckpointError, match=rf"layers\.\d\..*_proj\{ending}, got shape"):
        load(checkpoints.pair(settings("pack-quantized", symmetric=False), cut)[0])


@pytest.mark.parametrize(
    "changes",
    [{"format": "marlin-24"}, {"transform_config": {"config_groups": {"u": {}}}}],
)
def test_what_the_model_cannot_compute_is_refused(checkpoints: Any, changes: dict[str, Any]) -> None:
    path, _ = checkpoints.pair(settings("pack-quantized") | changes, lambda _, weight: packed(weight, 4, 64))
    with pytest.raises(MetalModelsError, match="Use another quantisation"):
        load(path)
