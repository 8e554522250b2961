"""Models that only a hub has: what is served, under which name, and which process asks the hub."""

import json
import urllib.request
from pathlib import Path

import pytest
from live_server import Server, serving

from vllm_metal_hub.testing import FaultServer
from vllm_metal_hub.testing.tiny_model import tiny_model, tokenizer_files

FLAGS = ("--max-model-len", "auto", "--max-num-seqs", "2")
CONFIGURATION = b"""
from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "llama"
"""


def variables(hub: FaultServer, home: Path, **more: str) -> dict[str, str]:
    return hub.environment(home) | {"HF_HUB_OFFLINE": "0", "VLLM_METAL_HUB_TIMEOUT": "20", **more}


def answer(server: Server, name: str) -> str:
    """What the server says to a fixed question; its model list and metrics must have the name that was typed."""
    client = server.client()
    assert [model.id for model in client.models.list()] == [name]
    text = client.completions.create(model=name, prompt="Hello", max_tokens=8, temperature=0).choices[0].text
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as metrics:
        assert f'model_name="{name}"' in metrics.read().decode()
    return str(text)


def assert_only_the_fetching_process_asked(hub: FaultServer) -> None:
    assert hub.requests
    assert {r.command for r in hub.requests if "vllm_metal_hub.fetch" not in r.command} == set()


def test_a_model_of_modelscope_is_served_with_the_hub_and_without_it(tmp_path: Path) -> None:
    with FaultServer() as hub:
        hub.add("org/tiny", tiny_model())
        environment = variables(hub, tmp_path, VLLM_USE_MODELSCOPE="True")
        with serving("org/tiny", tmp_path / "first", *FLAGS, **environment) as server:
            first = answer(server, "org/tiny")
        assert_only_the_fetching_process_asked(hub)
        assert all(r.path.startswith("/api/v1/") or r.on_storage for r in hub.requests)
    with serving("org/tiny", tmp_path / "second", *FLAGS, **environment) as server:
        assert answer(server, "org/tiny") == first


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
            assert answer(server, "org/coded")
        assert_only_the_fetching_process_asked(hub)
