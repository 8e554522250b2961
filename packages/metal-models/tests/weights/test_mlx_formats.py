"""MLX's own quantised checkpoints, as mlx-lm writes them: every mode and width, and mixed."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model, quantize_model

from metal_models import PagedModel, load

CONFIG = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
AFFINE = [("affine", 64, bits) for bits in (2, 3, 4, 5, 6, 8)]
MODES = [*AFFINE, ("affine", 32, 4), ("affine", 128, 4), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


def write(directory: Path, model: PagedModel, *, predicate: Any = None, **settings: Any) -> Path:
    module, config = quantize_model(model.module, dict(model.config), quant_predicate=predicate, **settings)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(module.parameters())))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def same_as_mlx_lm(lab: Any, path: Path, model: PagedModel) -> None:
    reference, _ = load_model(path)
    for prompt in lab.prompts(model.vocab_size, (3, 13)):
        expected = [int(token) for token, _ in generate_step(mx.array(prompt), reference, max_tokens=5)]
        server = lab.Server(model)
        request = server.request(prompt)
        lab.serve_mixed(server, [request], 5, chunk=5)
        assert request.tokens[len(prompt) :] == expected


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_every_mode(tmp_path: Path, tiny: Any, lab: Any, mode: str, group_size: int, bits: int) -> None:
    path = write(tmp_path, tiny("qwen3", **CONFIG), mode=mode, group_size=group_size, bits=bits)
    model = load(path)
    layer = model.module.layers[0].mlp.down_proj
    assert (layer.mode, layer.group_size, layer.bits) == (mode, group_size, bits)
    same_as_mlx_lm(lab, path, model)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_experts(tmp_path: Path, tiny: Any, lab: Any, mode: str) -> None:
    sizes = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    path = write(tmp_path, tiny("qwen3_moe"), mode=mode, group_size=sizes[0], bits=sizes[1])
    model = load(path)
    assert model.module.layers[0].mlp.switch_mlp.up_proj.mode == mode
    same_as_mlx_lm(lab, path, model)


def test_mixed_per_layer(tmp_path: Path, tiny: Any, lab: Any) -> None:
    def predicate(path: str, _: nn.Module) -> Any:
        if "v_proj" in path:
            return False
        if "down_proj" in path:
            return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
        return {"group_size": 32, "bits": 6} if "embed" in path or "lm_head" in path else True

    path = write(tmp_path, tiny("qwen3", **CONFIG), predicate=predicate, mode="affine", group_size=64, bits=4)
    model = load(path)
    layer = model.module.layers[0]
    assert (layer.mlp.up_proj.bits, layer.mlp.down_proj.mode, model.module.lm_head.bits) == (4, "mxfp8", 6)
    assert not hasattr(layer.self_attn.v_proj, "bits")
    same_as_mlx_lm(lab, path, model)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4", "affine"])
def test_dtype_override_reaches_rows_and_cache(tmp_path: Path, tiny: Any, mode: str, dtype: mx.Dtype) -> None:
    """The floating-point modes have scales of one byte, which are no hint of what to compute in."""
    group_size, bits, _ = {"mxfp4": (32, 4, 0), "mxfp8": (32, 8, 0), "nvfp4": (16, 4, 0), "affine": (32, 4, 0)}[mode]
    path = write(tmp_path, tiny("qwen3", **CONFIG), mode=mode, group_size=group_size, bits=bits)
    model = load(path, dtype=dtype)
    assert model.dtype == dtype
    assert {spec.page_dtype for spec in model.kv_cache_specs(16).values()} == {dtype}
    expanded = load(path, dtype=dtype, expand_to_bytes=1 << 30)
    assert expanded.dtype == dtype
    assert {array.dtype for _, array in tree_flatten(expanded.module.parameters())} == {dtype}
    if dtype == mx.float32:
        ids = mx.array([[5, 6, 7]])
        np.testing.assert_allclose(np.array(expanded.module(ids)), np.array(model.module(ids)), rtol=1e-3, atol=1e-3)


def test_settings_under_the_other_name(tmp_path: Path, tiny: Any, lab: Any) -> None:
    path = write(tmp_path, tiny("qwen3", **CONFIG), mode="affine", group_size=64, bits=4)
    expected = load(path)
    config = json.loads((path / "config.json").read_text())
    settings = config.pop("quantization")
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings | {"quant_method": "mlx"}}))
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(load(path).module(ids), expected.module(ids))
