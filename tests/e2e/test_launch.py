"""How a launch begins and ends: no variables needed, one clear message on failure, nothing left behind."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live_server import VLLM, environment, processes_of_group, serving

SMALL = ("--max-model-len", "256", "--max-num-seqs", "2")


def test_sigterm_ends_every_process(smollm2: Path, tmp_path: Path) -> None:
    with serving(smollm2, tmp_path / "log", *SMALL) as server:
        assert len(processes_of_group(server.process.pid)) > 1
        stream = server.client().completions.create(model=str(smollm2), prompt="Once", max_tokens=200, stream=True)
        next(iter(stream))
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(15)
        while processes_of_group(server.process.pid) and time.monotonic() - start < 15:
            time.sleep(0.1)
        assert time.monotonic() - start < 10
        assert processes_of_group(server.process.pid) == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux's unshare")
def test_plain_serve_where_the_hostname_does_not_resolve(smollm2: Path, tmp_path: Path) -> None:
    """Seed users had to export VLLM_HOST_IP and a timeout; nothing of the kind may be needed."""
    inside = ("unshare", "--uts", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")))
    rename = ("sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh")
    probe = subprocess.run([*inside, *rename, "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"this machine does not let a test rename its host: {probe.stderr.decode().strip()}")
    lookup = "import socket; socket.gethostbyname(socket.gethostname())"
    assert subprocess.run([*inside, *rename, sys.executable, "-c", lookup], capture_output=True).returncode != 0
    with serving(smollm2, tmp_path / "log", *SMALL, prefix=(*inside, *rename)) as server:
        answer = server.client().completions.create(model=str(smollm2), prompt="Hello", max_tokens=3)
        assert answer.usage.completion_tokens == 3


def write_tiny_model(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def missing(folder: Path, smollm2: Path) -> tuple[Path, str]:
    return folder / "nothing-here", "nothing-here"


def without_weights(folder: Path, smollm2: Path) -> tuple[Path, str]:
    return write_tiny_model(folder / "empty"), "safetensors"


def truncated_gguf(folder: Path, smollm2: Path) -> tuple[Path, str]:
    path = folder / "cut.gguf"
    path.write_bytes(smollm2.read_bytes()[: 40 * 1024 * 1024])
    return path, "cut.gguf"


def truncated_safetensors(folder: Path, smollm2: Path) -> tuple[Path, str]:
    model = write_tiny_model(folder / "cut")
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "F32", "shape": [128, 64], "data_offsets": [0, 32768]}}
    ).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 100)
    return model, "model.safetensors"


def unknown_architecture(folder: Path, smollm2: Path) -> tuple[Path, str]:
    model = write_tiny_model(folder / "odd", architectures=["OddForCausalLM"], model_type="odd")
    return model, "odd"


@pytest.mark.parametrize(
    "make", [missing, without_weights, truncated_gguf, truncated_safetensors, unknown_architecture]
)
def test_model_that_cannot_be_served_ends_with_one_message(make, smollm2: Path, tmp_path: Path) -> None:
    model, named = make(tmp_path, smollm2)
    result = subprocess.run(
        [*VLLM, "serve", str(model), *SMALL], env=environment(), capture_output=True, text=True, timeout=120
    )
    output = result.stdout + result.stderr
    assert result.returncode not in (0, -signal.SIGKILL)
    assert "Traceback" not in output, output[-3000:]
    errors = [line for line in output.splitlines() if named.lower() in line.lower() and "rror" in line]
    assert len(errors) == 1, output[-3000:]
