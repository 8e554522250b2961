"""The same architecture, written by others: every tensor finds its place."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from metal_models import load
from metal_models.registry import build


@pytest.fixture
def tensors(lab: SimpleNamespace, tmp_path: Path, tiny: Any) -> Any:
    """Writes a config, and returns its model's tensors for a test to write in another layout."""

    def make(name: str) -> dict[str, mx.array]:
        (tmp_path / "config.json").write_text(json.dumps(lab.read_config(name)))
        return dict(tree_flatten(tiny(name).module.parameters()))

    return make


def reread(directory: Path, written: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(directory / "model.safetensors"), written)
    found = dict(tree_flatten(load(directory).module.parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], array).item() for name, array in expected.items())


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_with_and_without_the_name_of_its_backbone(prefix: str, tensors: Any, tmp_path: Path) -> None:
    own = tensors("gpt2")
    written = {}
    for name, array in own.items():
        linear = name.endswith("weight") and (".c_" in name)
        written[prefix + name.removeprefix("model.")] = array.T if linear else array
    if prefix:
        written["lm_head.weight"] = own["model.wte.weight"]
        written["transformer.h.0.attn.bias"] = mx.ones((1, 1, 8, 8))
        written["transformer.h.0.attn.masked_bias"] = mx.array(-1e4)
    reread(tmp_path, written, own)


def test_gpt_oss_with_experts_as_floats(tensors: Any, tmp_path: Path) -> None:
    own = tensors("gpt_oss")
    written = {}
    for name, array in own.items():
        stem, _, last = name.rpartition(".")
        if ".experts." not in name:
            written[name] = array
        elif ".gate_proj" in name:
            pair = mx.stack([array, own[name.replace("gate_proj", "up_proj")]], axis=2)
            joined = pair.reshape(array.shape[0], -1, *array.shape[2:])
            joint = stem.replace("gate_proj", "gate_up_proj")
            written |= {joint: joined.swapaxes(1, 2)} if last == "weight" else {f"{joint}_bias": joined}
        elif ".down_proj" in name:
            written |= {stem: array.swapaxes(1, 2)} if last == "weight" else {f"{stem}_bias": array}
    reread(tmp_path, written, own)


def test_norms_of_olmo_hybrid_by_their_first_names(tensors: Any, tmp_path: Path) -> None:
    own, written = tensors("olmo_hybrid"), {}
    for name, array in own.items():
        recurrent = f"{name.rpartition('.')[0].rpartition('.')[0]}.linear_attn.A_log" in own
        old = name.replace("input_layernorm", "attention_layer_norm")
        old = old.replace("post_attention_layernorm", "feedforward_layer_norm") if recurrent else old
        written[old] = array
    assert any("attention_layer_norm" in name for name in written)
    reread(tmp_path, written, own)


def test_others_are_mlx_lms_own_classes(lab: SimpleNamespace) -> None:
    assert type(build(lab.read_config("llama"))).__module__ == "mlx_lm.models.llama"
    assert type(build(lab.read_config("gpt_oss"))).__module__ == "mlx_lm.models.gpt_oss"
