"""AWQ checkpoints, packed here as AutoAWQ's gemm version packs them."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_models import CheckpointError, MetalModelsError, load

METHOD = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: np.ndarray) -> mx.array:
    """Pack along the last axis, eight codes a word in AWQ's order."""
    groups = codes.reshape(*codes.shape[:-1], -1, 8)[..., list(ORDER)].astype(np.uint64)
    return mx.array((groups << (4 * np.arange(8, dtype=np.uint64))).sum(-1).astype(np.uint32).view(np.int32))


def quantize(weight: np.ndarray, group: int) -> Any:
    rows, columns = weight.shape
    parts = weight.reshape(rows, -1, group)
    low = np.minimum(parts.min(-1), 0)
    scales = ((np.maximum(parts.max(-1), 0) - low) / 15).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 0, 15)
    wide = scales.astype(np.float32)
    codes = np.clip(np.round(parts / wide[..., None]) + zeros[..., None], 0, 15)
    values = (codes - zeros[..., None]) * wide[..., None]
    stored = {
        ".qweight": words(codes.reshape(rows, columns).T.astype(np.int64)),
        ".qzeros": words(zeros.T.astype(np.int64)),
        ".scales": mx.array(scales.T),
    }
    return stored, values.reshape(rows, columns).astype(np.float32)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_stay_packed(checkpoints: Any, group: int) -> None:
    model = checkpoints.same(*checkpoints.pair(METHOD, lambda _, weight: quantize(weight, group)))
    layer = model.module.layers[0].mlp.gate_proj
    assert (layer.bits, layer.group_size, layer.mode) == (4, group, "affine")
    assert model.config["quantization"] == {"group_size": group, "bits": 4, "mode": "affine"}


def test_experts(checkpoints: Any) -> None:
    paths = checkpoints.pair(METHOD, lambda _, weight: quantize(weight, 32), "qwen3_moe", moe_intermediate_size=64)
    assert checkpoints.same(*paths).module.layers[0].mlp.switch_mlp.up_proj.bits == 4


def test_weights_that_mlx_lm_splits_by_columns_become_floats(checkpoints: Any) -> None:
    config, tensors = checkpoints.model("deepseek_v3", hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
    split = {key: tensors.pop(key) for key in list(tensors) if ".embed_q." in key or ".unembed_out." in key}
    for key, heads in split.items():
        if ".embed_q." in key:
            values = split[key.replace(".embed_q.", ".unembed_out.")]
            whole = np.concatenate([heads.swapaxes(1, 2), values], axis=1)
            tensors[key.replace(".embed_q.", ".kv_b_proj.")] = whole.reshape(-1, whole.shape[-1])
    stored = dict(tensors)
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        parts, tensors[key] = quantize(stored.pop(key), 32)
        stored |= {key.removesuffix(".weight") + ending: part for ending, part in parts.items()}
    quantised = checkpoints.write("quantised", config | {"quantization_config": METHOD}, stored)
    model = checkpoints.same(quantised, checkpoints.write("floats", config, tensors))
    assert model.module.layers[1].mlp.switch_mlp.up_proj.bits == 4
    assert not hasattr(model.module.layers[0].self_attn.embed_q, "bits")


@pytest.mark.parametrize("missing", [".qzeros", ".scales"])
def test_missing_tensor_is_named(checkpoints: Any, missing: str) -> None:
    def without(name: str, weight: np.ndarray) -> Any:
        parts, values = quantize(weight, 64)
        return {k: v for k, v in parts.items() if k != missing or "0.self_attn.k" not in name}, values

    with pytest.raises(CheckpointError, match=r"\[load\] expected .*layers\.0\.self_attn\.k_proj"):
        load(checkpoints.pair(METHOD, without)[0])


def test_misshapen_tensor_is_named(checkpoints: Any) -> None:
    def cut(_: str, weight: np.ndarray) -> Any:
        parts, values = quantize(weight, 64)
        return parts | {".qweight": parts[".qweight"][:, :-1]}, values

    with pytest.raises(CheckpointError, match=r"layers\.\d\..*_proj\.qweight, got shape"):
        load(checkpoints.pair(METHOD, cut)[0])


@pytest.mark.parametrize("settings", [{"version": "gemv"}, {"bits": 8}])
def test_other_packings_are_refused(checkpoints: Any, settings: dict[str, Any]) -> None:
    path, _ = checkpoints.pair(METHOD | settings, lambda _, weight: quantize(weight, 64))
    with pytest.raises(MetalModelsError, match="expected AWQ weights of version gemm with 4 bits"):
        load(path)
