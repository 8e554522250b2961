"""Models that only a hub has: what is served, under which name, and which process asks the hub."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from live_server import Server, assert_sigterm_ends_every_process, serving
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.lfm2 import Model, ModelArgs

from vllm_metal_hub.testing import FaultServer
from vllm_metal_hub.testing.tiny_model import tiny_model, tokenizer_files

FLAGS = ("--max-model-len", "auto", "--max-num-seqs", "2")
CONFIGURATION = b"""
from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "llama"
"""
# Recurrent layers and attention.
LFM2: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "rope_theta": 10000.0,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PROMPTS = [[1, 5, 9, 17], [1, *range(10, 80)], [1, *range(10, 75), 90]]


@pytest.fixture(scope="module")
def lfm2() -> Any:
    """mlx-lm's model, with random weights."""
    mx.random.seed(3)
    model = Model(ModelArgs.from_dict(LFM2))
    model.update(tree_map(lambda array: 3 * array if array.ndim > 1 else array, model.parameters()))
    mx.eval(model.parameters())
    return model


def repository(model: Any, scratch: Path) -> dict[str, bytes]:
    """The tiny model's files, in two shards and beside duplicates that nobody should fetch, with other weights."""
    files = tiny_model() | {"config.json": json.dumps(LFM2).encode()}
    weights = tree_flatten(model.parameters())
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    placed = {}
    for position, shard in enumerate(shards):
        part = dict(weights[position :: len(shards)])
        mx.save_safetensors(str(scratch / shard), part, metadata={"format": "mlx"})
        files[shard] = (scratch / shard).read_bytes()
        placed |= dict.fromkeys(part, shard)
    return files | {"model.safetensors.index.json": json.dumps({"weight_map": placed}).encode()}


def variables(hub: FaultServer, home: Path, **more: str) -> dict[str, str]:
    return hub.environment(home) | {"HF_HUB_OFFLINE": "0", "VLLM_METAL_HUB_TIMEOUT": "20", **more}


def answers(server: Server, name: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens; the server's model list and metrics must have the name that was typed."""
    client = server.client()
    assert [model.id for model in client.models.list()] == [name]
    options: dict[str, Any] = {"model": name, "max_tokens": 10, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True, "return_token_ids": True}
    found = [client.completions.create(prompt=prompt, **options).choices[0].token_ids for prompt in prompts]
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as metrics:
        assert f'model_name="{name}"' in metrics.read().decode()
    return found


def assert_only_the_fetching_process_asked(hub: FaultServer) -> None:
    assert hub.requests
    assert {r.command for r in hub.requests if "vllm_metal_hub.fetch" not in r.command} == set()


def test_a_hybrid_model_of_modelscope_is_served_with_the_hub_and_without_it(lfm2: Any, tmp_path: Path) -> None:
    """Tokens are mlx-lm's."""
    expected = [[int(t) for t, _ in generate_step(mx.array(prompt), lfm2, max_tokens=10)] for prompt in PROMPTS]
    with FaultServer() as hub:
        hub.add("org/tiny", repository(lfm2, tmp_path))
        environment = variables(hub, tmp_path, VLLM_USE_MODELSCOPE="True")
        with serving("org/tiny", tmp_path / "first", *FLAGS, **environment) as server:
            assert answers(server, "org/tiny", PROMPTS) == expected
        assert_only_the_fetching_process_asked(hub)
        assert all(r.path.startswith("/api/v1/") or r.on_storage for r in hub.requests)
    with serving("org/tiny", tmp_path / "second", *FLAGS, **environment) as server:
        assert answers(server, "org/tiny", PROMPTS) == expected
        assert_sigterm_ends_every_process(server)


@pytest.mark.slow
def test_no_process_of_a_large_launch_asks_a_hub(tmp_path: Path) -> None:
    """Two engines, two API servers, a tokenizer and code from other repositories, nothing pulled before."""
    tiny = tiny_model()
    config = json.loads(tiny["config.json"]) | {"auto_map": {"AutoConfig": "org/code--configuration_tiny.TinyConfig"}}
    with FaultServer() as hub:
        hub.add("org/coded", tiny | {"config.json": json.dumps(config).encode()})
        hub.add("org/words", tokenizer_files() | {"config.json": tiny["config.json"]})
        hub.add("org/code", {"configuration_tiny.py": CONFIGURATION, "config.json": tiny["config.json"]})
        flags = (*FLAGS, "--tokenizer", "org/words", "--trust-remote-code", "--data-parallel-size", "2")
        with serving("org/coded", tmp_path / "log", *flags, **variables(hub, tmp_path)) as server:
            assert answers(server, "org/coded", PROMPTS[:1])
        assert_only_the_fetching_process_asked(hub)
