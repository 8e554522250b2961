"""FP8 checkpoints: DeepSeek's blocks, a scale a row, a scale a tensor, and scales that are powers of two."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_models import CheckpointError, MetalModelsError, load
from metal_models.weights.fp8 import scale_values

METHOD = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = METHOD | {"weight_block_size": [64, 64]}


def quantize(weight: np.ndarray, rows: int, columns: int, *, powers: bool = False) -> tuple[mx.array, Any, Any]:
    """Return codes, scales by block, and values."""
    height, width = weight.shape
    scales = np.zeros((-(-height // rows), -(-width // columns)), np.float32)
    for row, column in np.ndindex(scales.shape):
        part = weight[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
        scales[row, column] = np.abs(part).max() / 448
    if powers:
        scales = 2.0 ** np.ceil(np.log2(scales))
    by_element = scales.repeat(rows, 0)[:height].repeat(columns, 1)[:, :width]
    codes = mx.to_fp8(mx.array(weight / by_element))
    return codes, mx.array(scales), np.array(mx.from_fp8(codes, mx.float32)) * by_element


def in_blocks(weight: np.ndarray, **options: Any) -> Any:
    codes, scales, values = quantize(weight, 64, 64, **options)
    return {".weight": codes, ".weight_scale_inv": scales}, values


def is_quantised(layer: Any) -> bool:
    return hasattr(layer, "bits")


def test_blocks_become_floats(checkpoints: Any) -> None:
    """Some blocks are cut off by the edge of the weight."""
    paths = checkpoints.pair(BLOCKS, lambda _, weight: in_blocks(weight), intermediate_size=160)
    assert not is_quantised(checkpoints.same(*paths, tolerance=1e-6).module.layers[0].mlp.up_proj)


def test_floats_are_rounded_once(checkpoints: Any) -> None:
    quantised, floats = checkpoints.pair(BLOCKS, lambda _, weight: in_blocks(weight))
    weight = load(quantised, dtype=mx.bfloat16).module.layers[0].mlp.up_proj.weight
    assert mx.array_equal(weight, load(floats).module.layers[0].mlp.up_proj.weight.astype(mx.bfloat16))


@pytest.mark.parametrize("block", [(64, 64), (128, 128), (1, 256)])
def test_powers_of_two_stay_in_eight_bits(checkpoints: Any, block: tuple[int, int]) -> None:
    def powers(_: str, weight: np.ndarray) -> Any:
        codes, scales, values = quantize(weight, *block, powers=True)
        return {".weight": codes, ".weight_scale_inv": scales}, values

    settings = METHOD | {"weight_block_size": list(block)}
    model = checkpoints.same(*checkpoints.pair(settings, powers, intermediate_size=160))
    layer = model.module.layers[0].mlp.down_proj
    assert (layer.bits, layer.group_size, layer.mode) == (8, 32, "mxfp8")


def test_powers_of_two_are_exact(checkpoints: Any) -> None:
    quantised, floats = checkpoints.pair(BLOCKS, lambda _, weight: in_blocks(weight, powers=True))
    layer = load(quantised).module.layers[0].mlp.down_proj
    values = mx.dequantize(layer.weight, layer.scales, mode="mxfp8", dtype=mx.float32)
    assert mx.array_equal(values, load(floats).module.layers[0].mlp.down_proj.weight)


def test_scales_that_are_exponents(checkpoints: Any) -> None:
    def exponents(_: str, weight: np.ndarray) -> Any:
        parts, values = in_blocks(weight, powers=True)
        bits = (np.log2(np.array(parts[".weight_scale_inv"])) + 127).astype(np.uint8)
        return parts | {".weight_scale_inv": mx.array(bits)}, values

    assert is_quantised(checkpoints.same(*checkpoints.pair(BLOCKS, exponents)).module.layers[0].mlp.up_proj)


def test_exponents_are_exact() -> None:
    found = np.array(scale_values(mx.arange(255).astype(mx.uint8)), np.float64)
    np.testing.assert_array_equal(found, 2.0 ** np.arange(-127, 128))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_for_the_tensor(checkpoints: Any, shape: tuple[int, ...]) -> None:
    def whole(_: str, weight: np.ndarray) -> Any:
        codes, scales, values = quantize(weight, *weight.shape)
        return {".weight": codes, ".weight_scale": scales.reshape(shape), ".input_scale": mx.ones(())}, values

    checkpoints.same(*checkpoints.pair(METHOD, whole), tolerance=1e-6)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_scale_for_each_row(checkpoints: Any, shape: tuple[int, ...]) -> None:
    def by_row(_: str, weight: np.ndarray) -> Any:
        codes, scales, values = quantize(weight, 1, weight.shape[1])
        return {".weight": codes, ".weight_scale": scales.reshape(shape)}, values

    checkpoints.same(*checkpoints.pair({"quant_method": "fbgemm_fp8"}, by_row), tolerance=1e-6)


@pytest.mark.parametrize("powers", [False, True])
def test_experts(checkpoints: Any, powers: bool) -> None:
    paths = checkpoints.pair(BLOCKS, lambda _, weight: in_blocks(weight, powers=powers), "qwen3_moe")
    assert is_quantised(checkpoints.same(*paths).module.layers[0].mlp.switch_mlp.up_proj) == powers


def test_missing_scale_is_named(checkpoints: Any) -> None:
    def without(name: str, weight: np.ndarray) -> Any:
        parts, values = in_blocks(weight)
        return {k: v for k, v in parts.items() if k == ".weight" or "1.mlp.up" not in name}, values

    with pytest.raises(CheckpointError, match=r"scales beside model\.layers\.1\.mlp\.up_proj\.weight"):
        load(checkpoints.pair(BLOCKS, without)[0])


def test_misshapen_scale_is_named(checkpoints: Any) -> None:
    def cut(_: str, weight: np.ndarray) -> Any:
        parts, values = in_blocks(weight)
        return parts | {".weight_scale_inv": mx.ones((3, 5))}, values

    with pytest.raises(CheckpointError, match=r"layers\.\d\..*_proj\.weight_scale_inv, got shape \(3, 5\)"):
        load(checkpoints.pair(BLOCKS, cut)[0])


def test_other_numbers_are_refused(checkpoints: Any) -> None:
    path, _ = checkpoints.pair(BLOCKS | {"fmt": "e5m2"}, lambda _, weight: in_blocks(weight))
    with pytest.raises(MetalModelsError, match="format e4m3, got e5m2"):
        load(path)


def test_codes_without_a_named_format_are_refused(checkpoints: Any) -> None:
    config, tensors = checkpoints.model()
    name = "model.layers.0.mlp.up_proj.weight"
    path = checkpoints.write("plain", config, tensors | {name: in_blocks(tensors[name])[0][".weight"]})
    with pytest.raises(CheckpointError, match=r"floating-point numbers in model\.layers\.0\.mlp\.up_proj\.weight"):
        load(path)
