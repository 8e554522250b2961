"""What a launch names becomes local paths before vLLM's configuration is built."""

from types import SimpleNamespace

import pytest

from vllm_metal_hub.testing.repository import safetensors
from vllm_metal_hub.vllm_plugin import local_path, prepare
from vllm_metal_plugin.errors import ModelFilesError

FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": safetensors("a", 1000)}


def engine_args(**given):
    defaults = dict.fromkeys(
        ("tokenizer", "tokenizer_revision", "revision", "hf_config_path", "speculative_config", "default_mm_loras")
    )
    return SimpleNamespace(**defaults | {"model": "org/main"} | given)


def test_everything_beside_the_model_becomes_a_path(hub):
    for name in ("tok", "config", "draft", "lora"):
        hub.add(f"org/{name}", dict(FILES))
    args = engine_args(
        tokenizer="org/tok", hf_config_path="org/config", speculative_config={"model": "org/draft", "n": 3},
        default_mm_loras={"audio": "org/lora"},
    )  # fmt: skip
    prepare(args)
    found = [args.tokenizer, args.hf_config_path, args.speculative_config["model"], args.default_mm_loras["audio"]]
    assert all(path.startswith("/") for path in found)
    assert args.speculative_config["n"] == 3
    assert args.model == "org/main"
    hub.forget()
    prepare(args)
    assert [args.tokenizer, args.hf_config_path] == found[:2]
    assert hub.requests == []


def test_a_tokenizer_from_elsewhere_costs_no_weights(hub):
    hub.add("org/tok", dict(FILES))
    prepare(args := engine_args(tokenizer="org/tok"))
    assert args.tokenizer.startswith("/")
    assert not [r for r in hub.requests if "safetensors" in r.path]


def test_methods_that_are_no_models_are_left_alone(hub):
    prepare(args := engine_args(speculative_config={"method": "ngram", "model": "ngram"}))
    assert args.speculative_config["model"] == "ngram"
    assert hub.requests == []


def test_errors_are_the_plugins_own_kind(hub):
    with pytest.raises(ModelFilesError, match="org/none"):
        local_path("org/none", None)
