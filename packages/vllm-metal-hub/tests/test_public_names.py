"""What a program imports from the package itself."""

import json

import pytest

import vllm_metal_hub as hub_api
from vllm_metal_hub.errors import NotFoundError
from vllm_metal_hub.testing.repository import safetensors

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "vocab_size": 256, "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "float16",
}  # fmt: skip


def test_a_model_from_plan_to_remove(hub):
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors("a", 100_000)}
    hub.add("org/tiny", files)
    assert hub_api.plan("org/tiny").context == 2048
    small = hub_api.resolve("org/tiny", source="modelscope", profile="small")
    assert not (small.path / "model.safetensors").exists()
    snapshot = hub_api.resolve("org/tiny", revision="master", source="modelscope,huggingface", update="check")
    assert isinstance(snapshot, hub_api.LocalSnapshot)
    assert snapshot.source == "modelscope"
    assert hub_api.verify("ms://org/tiny") == {}
    (snapshot.path / "model.safetensors").write_bytes(b"short")
    assert list(hub_api.verify("ms://org/tiny", full=False)) == ["model.safetensors"]
    assert hub_api.resolve("org/tiny", source="modelscope", update="always").check == "hash"
    assert "org/tiny" in {item.name for item in hub_api.installed()}
    assert hub_api.remove("org/tiny") > 100_000
    with pytest.raises(NotFoundError):
        hub_api.verify("org/tiny")


def test_the_version_is_the_distributions():
    assert hub_api.__version__ == __import__("importlib.metadata").metadata.version("vllm-metal-hub")
    with pytest.raises(AttributeError):
        hub_api.nothing_of_this_name  # noqa: B018
