"""How a launch begins and ends: no variables needed, one clear message on failure."""

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from live_server import VLLM, environment, nameless_host

SMALL = ("--max-model-len", "256", "--max-num-seqs", "2")


@pytest.mark.skipif(not nameless_host(), reason="this machine does not let a test rename its host")
def test_plain_serve_where_the_hostname_does_not_resolve(client: openai.OpenAI) -> None:
    """Seed users had to export VLLM_HOST_IP and a timeout; nothing of the kind may be needed."""
    answer = client.completions.create(model="smollm2", prompt="Hello", max_tokens=3)
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


# Imports vLLM's command line once, and runs each launch in a process that goes on from there.
LAUNCHES = """
import json, os, sys
from contextlib import suppress
from vllm.entrypoints.cli.main import main

sys.argv = ["vllm", "--version"]
with suppress(SystemExit):
    main()
for line in sys.stdin:
    arguments, output = json.loads(line)
    process = os.fork()
    if process == 0:
        log = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["vllm", *arguments]
        try:
            main()
        except SystemExit as stop:
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    print("ended:", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def assert_one_message(code: int, output: str, named: str) -> None:
    assert code not in (0, -signal.SIGKILL)
    assert "Traceback" not in output, output[-3000:]
    errors = [line for line in output.splitlines() if named.lower() in line.lower() and "rror" in line]
    assert len(errors) == 1, output[-3000:]


def test_model_that_is_not_there_ends_with_one_message(smollm2: Path, tmp_path: Path) -> None:
    model, named = missing(tmp_path, smollm2)
    command = [*VLLM, "serve", str(model), *SMALL]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert_one_message(result.returncode, result.stdout + result.stderr, named)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs ``vllm`` with some arguments; returns its exit code and what it printed."""
    folder: Path = tmp_path_factory.mktemp("launches")
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHES], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(*arguments: str) -> tuple[int, str]:
            output = folder / str(len(list(folder.iterdir())))
            print(json.dumps([arguments, str(output)]), file=process.stdin, flush=True)
            ended = next(line for line in process.stdout if line.startswith("ended:"))
            return int(ended.split()[1]), output.read_text()

        yield run


@pytest.mark.parametrize("make", [without_weights, truncated_gguf, truncated_safetensors, unknown_architecture])
def test_model_that_cannot_be_served_ends_with_one_message(make, launch, smollm2: Path, tmp_path: Path) -> None:
    model, named = make(tmp_path, smollm2)
    assert_one_message(*launch("serve", str(model), *SMALL), named)


def test_too_little_memory_ends_with_what_would_fit(launch, smollm2: Path) -> None:
    code, output = launch("serve", str(smollm2), "--max-model-len", "8192", "--kv-cache-memory-bytes", "100000000")
    assert code == 1
    assert "Traceback" not in output, output[-3000:]
    last = output.splitlines()[-1]
    assert last.startswith("error: Paged attention: not enough Metal memory for KV cache.")
    assert "(--kv-cache-memory-bytes); reduce --max-model-len to" in last
