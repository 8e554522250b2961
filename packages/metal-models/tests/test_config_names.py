"""Configs written by transformers 5 mean what they say."""

import mlx.nn as nn
import pytest

from metal_models.config_names import with_old_names
from metal_models.registry import build


def test_rope_parameters_are_known_by_their_old_names_too() -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0, "partial_rotary_factor": 0.5}
    named = with_old_names({"model_type": "llama", "rope_parameters": rope})
    assert (named["rope_theta"], named["partial_rotary_factor"]) == (5e5, 0.5)
    assert named["rope_scaling"] == {"type": "linear", **rope}


def test_old_names_win() -> None:
    assert with_old_names({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}})["rope_theta"] == 1.0


def test_kinds_of_layers() -> None:
    rope = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "per_layer_config": {"1": {"head_dim": 512}}}
    named = with_old_names({"text_config": {"rope_parameters": rope, **layers}})["text_config"]
    assert (named["rope_theta"], named["rope_local_base_freq"], named["global_head_dim"]) == (1e6, 1e4, 512)


def test_models_are_built_with_them(lab) -> None:
    config = lab.read_config("qwen2")
    for name in ("rope_theta", "rope_scaling"):
        config.pop(name, None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1234.0}
    assert build(config).model.layers[0].self_attn.rope.base == 1234.0


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("glm4_moe", ("rope_theta", "rope_scaling", "partial_rotary_factor")),
        ("gpt_neox", ("rotary_emb_base", "rotary_pct")),
    ],
)
def test_models_that_insist_on_old_names_are_built_without_them(lab, name: str, absent: tuple[str, ...]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1234.0, "partial_rotary_factor": 0.25}
    config = {key: value for key, value in lab.read_config(name).items() if key not in absent}
    ropes = [module for module in build(config | {"rope_parameters": rope}).modules() if isinstance(module, nn.RoPE)]
    assert {(rope.base, rope.dims) for rope in ropes} == {(1234.0, 4)}


def test_experts_by_the_other_name(lab) -> None:
    config = lab.read_config("mellum")
    config["num_local_experts"] = config.pop("num_experts")
    assert build(config).args.num_experts == config["num_local_experts"]


def test_numbers_that_json_does_not_have() -> None:
    named = with_old_names({"time_step_limit": [0.0, {"__float__": "Infinity"}], "lowest": {"__float__": "-Infinity"}})
    assert named == {"time_step_limit": [0.0, float("inf")], "lowest": float("-inf")}


def test_kinds_of_layers_by_the_names_of_transformers(lab) -> None:
    config = lab.read_config("granitemoehybrid") | {"layer_types": ["linear_attention", "full_attention"] * 2}
    assert [layer.layer_type for layer in build(config).layers] == ["mamba", "attention"] * 2


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_language_models_without_their_wrapper(lab, name: str) -> None:
    text = lab.read_config(name)["text_config"]
    alone = build(text | {"model_type": f"{name}_text"})
    assert len(alone.layers) == text["num_hidden_layers"]
