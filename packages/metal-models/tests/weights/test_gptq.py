"""GPTQ checkpoints, packed here as AutoGPTQ packs them."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_models import CheckpointError, MetalModelsError, load
from metal_models.capacity import converted_weight_bytes
from metal_models.checkpoint import read_config
from metal_models.loader import weight_bytes

METHOD = {"quant_method": "gptq"}


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack down the first axis: a stream of bits, low ones first, in int32 words."""
    spread = (codes[:, None, :] >> np.arange(bits)[:, None] & 1).reshape(-1, 32, codes.shape[1])
    return (
        (spread.astype(np.uint64) << np.arange(32, dtype=np.uint64)[:, None]).sum(1).astype(np.uint32).view(np.int32)
    )


def quantize(
    weight: np.ndarray, bits: int, group: int, *, symmetric: bool = False, offset: int = 1, shuffled: bool = False
) -> Any:
    rows, columns = weight.shape
    group_of = np.arange(columns) // group
    if shuffled:
        group_of = np.random.default_rng(0).permutation(group_of)
    top = (1 << bits) - 1
    scales = np.zeros((columns // group, rows), np.float16)
    zeros = np.zeros((columns // group, rows), np.int64)
    codes = np.zeros((columns, rows), np.int64)
    for index in range(columns // group):
        part = weight[:, group_of == index]
        if symmetric:
            scales[index] = 2 * np.abs(part).max(1) / top
            zeros[index] = (top + 1) // 2
        else:
            low = np.minimum(part.min(1), 0)
            scales[index] = (np.maximum(part.max(1), 0) - low) / top
            zeros[index] = np.clip(np.round(-low / scales[index]), 0, top)
        scale = scales[index].astype(np.float32)
        codes[group_of == index] = np.clip(np.round(part.T / scale) + zeros[index], 0, top)
    values = (codes - zeros[group_of]) * scales[group_of].astype(np.float32)
    stored = {
        ".qweight": words(codes, bits),
        ".qzeros": words(((zeros - offset) & top).T, bits).T.copy(),
        ".scales": scales,
        ".g_idx": group_of.astype(np.int32),
    }
    return {ending: mx.array(array) for ending, array in stored.items()}, values.T.astype(np.float32)


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 128), (4, 32), (4, 64), (8, 128)])
def test_codes_stay_packed(checkpoints: Any, bits: int, group: int) -> None:
    paths = checkpoints.pair(METHOD | {"bits": bits}, lambda _, weight: quantize(weight, bits, group))
    layer = checkpoints.same(*paths).module.layers[0].self_attn.q_proj
    assert (layer.bits, layer.group_size, layer.mode) == (bits, group, "affine")


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, 32), (3, 64)])
def test_bytes_are_known_from_the_config(checkpoints: Any, bits: int, group: int) -> None:
    settings = METHOD | {"bits": bits, "group_size": group}
    path, _ = checkpoints.pair(settings, lambda _, weight: quantize(weight, bits, group))
    model = load(path, dtype=mx.float16)
    assert converted_weight_bytes(read_config(path), dtype=mx.float16) == pytest.approx(model.nbytes, rel=0.02)
    assert load(path, dtype=mx.float32, expand_to_bytes=1 << 30).nbytes == weight_bytes(
        path, dtype=mx.float32, expand_to_bytes=1 << 30
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_values_are_those_of_the_file(checkpoints: Any, symmetric: bool) -> None:
    quantised, floats = checkpoints.pair(METHOD, lambda _, weight: quantize(weight, 4, 64, symmetric=symmetric))
    layer = load(quantised, dtype=mx.float32).module.layers[1].mlp.down_proj
    values = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    expected = load(floats).module.layers[1].mlp.down_proj.weight
    np.testing.assert_allclose(np.array(values), np.array(expected), rtol=1e-6, atol=1e-6)


def test_symmetric_values_are_exact_in_half_precision(checkpoints: Any) -> None:
    quantised, floats = checkpoints.pair(METHOD, lambda _, weight: quantize(weight, 4, 64, symmetric=True))
    model = load(quantised, dtype=mx.float16)
    layer = model.module.layers[1].mlp.down_proj
    assert layer.scales.dtype == model.dtype == mx.float16
    exact = mx.dequantize(
        layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32), layer.group_size, layer.bits
    )
    np.testing.assert_array_equal(np.array(exact), np.array(load(floats).module.layers[1].mlp.down_proj.weight))


def test_zero_points_of_the_second_version(checkpoints: Any) -> None:
    settings = METHOD | {"checkpoint_format": "gptq_v2"}
    checkpoints.same(*checkpoints.pair(settings, lambda _, weight: quantize(weight, 4, 64, offset=0)))


def test_a_scale_for_a_whole_row(checkpoints: Any) -> None:
    paths = checkpoints.pair(METHOD, lambda _, weight: quantize(weight, 4, weight.shape[1]))
    assert checkpoints.same(*paths).module.layers[0].mlp.down_proj.group_size == 128


@pytest.mark.parametrize(("group", "shuffled"), [(16, False), (64, True)])
def test_what_does_not_map_becomes_floats(checkpoints: Any, group: int, shuffled: bool) -> None:
    paths = checkpoints.pair(METHOD, lambda _, weight: quantize(weight, 4, group, shuffled=shuffled))
    model = checkpoints.same(*paths)
    assert not hasattr(model.module.layers[0].self_attn.q_proj, "bits")
    assert "quantization" not in model.config


def test_experts(checkpoints: Any) -> None:
    paths = checkpoints.pair(METHOD, lambda _, weight: quantize(weight, 4, 32), "qwen3_moe", moe_intermediate_size=64)
    assert checkpoints.same(*paths).module.layers[0].mlp.switch_mlp.down_proj.bits == 4


def test_biases_of_zeros_that_the_model_does_not_have(checkpoints: Any) -> None:
    def with_bias(_: str, weight: np.ndarray) -> Any:
        parts, values = quantize(weight, 4, 64)
        return parts | {".bias": mx.zeros((weight.shape[0],))}, values

    checkpoints.same(*checkpoints.pair(METHOD, with_bias))


def test_layers_of_several_widths(checkpoints: Any) -> None:
    paths = checkpoints.pair(METHOD, lambda name, weight: quantize(weight, 8 if "down" in name else 4, 64))
    quantization = checkpoints.same(*paths).config["quantization"]
    assert quantization["bits"] == 4
    assert quantization["model.layers.0.mlp.down_proj"] == {"group_size": 64, "bits": 8, "mode": "affine"}


@pytest.mark.parametrize("missing", [".qzeros", ".scales", ".qweight"])
def test_missing_tensor_is_named(checkpoints: Any, missing: str) -> None:
    def without(name: str, weight: np.ndarray) -> Any:
        parts, values = quantize(weight, 4, 64)
        return {k: v for k, v in parts.items() if k != missing or "0.self_attn.k" not in name}, values

    with pytest.raises(CheckpointError, match=r"\[load\] expected .*layers\.0\.self_attn\.k_proj"):
        load(checkpoints.pair(METHOD, without)[0])


def test_extra_weight_is_named(checkpoints: Any) -> None:
    def extra(name: str, weight: np.ndarray) -> Any:
        parts, values = quantize(weight, 4, 64)
        more = {ending.replace(".", ".more."): part for ending, part in parts.items()} if "1.mlp.up" in name else {}
        return parts | more, values

    with pytest.raises(CheckpointError, match=r"not in model.*model\.layers\.1\.mlp\.up_proj\.more\.weight"):
        load(checkpoints.pair(METHOD, extra)[0])


def test_misshapen_tensor_is_named(checkpoints: Any) -> None:
    def cut(_: str, weight: np.ndarray) -> Any:
        parts, values = quantize(weight, 4, 64)
        return parts | {".qzeros": parts[".qzeros"][:, :-1]}, values

    with pytest.raises(CheckpointError, match=r"layers\.\d\..*_proj\.qzeros, got shape"):
        load(checkpoints.pair(METHOD, cut)[0])


def test_other_packings_are_refused(checkpoints: Any) -> None:
    path, _ = checkpoints.pair(METHOD | {"checkpoint_format": "marlin"}, lambda _, weight: quantize(weight, 4, 64))
    with pytest.raises(MetalModelsError, match="checkpoint_format gptq or gptq_v2, got marlin"):
        load(path)
