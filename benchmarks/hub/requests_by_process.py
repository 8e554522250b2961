"""How many requests each process of a launch sends to a hub, for every way of launching that users have.

    python benchmarks/hub/requests_by_process.py [ROW ...]

A server of this machine speaks both hubs' protocols and notes which process asks. Each row starts `vllm serve`, asks
it something, stops it, and counts. Only the process that fetches may have asked; the exit code is 1 if any other did.
Every row starts vLLM, so give the names of rows to run some of them.
"""

import argparse
import json
import os
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_metal_hub.errors import HubError
from vllm_metal_hub.server_process import ServerProcess, free_port, vllm_command
from vllm_metal_hub.testing import FaultServer
from vllm_metal_hub.testing.tiny_model import tiny_model, tokenizer_files

CONFIGURATION = """
from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "llama"
"""
FLAGS = ("--max-model-len", "128", "--max-num-seqs", "2")
TWO = ("--api-server-count", "2")


@dataclass(frozen=True)
class Row:
    """One way of launching; ``warm`` rows pull first."""

    name: str
    model: str = "org/tiny"
    flags: tuple[str, ...] = ()
    modelscope: bool = False
    warm: bool = True
    offline: bool = False


ROWS = (
    Row("hf-cold", warm=False),
    Row("hf-warm"),
    Row("hf-warm-api-servers", flags=TWO),
    Row("hf-cold-api-servers", flags=TWO, warm=False),
    Row("hf-cold-data-parallel", flags=("--data-parallel-size", "2"), warm=False),
    Row("hf-cold-tokenizer-and-code", "org/coded", ("--tokenizer", "org/words", "--trust-remote-code"), warm=False),
    Row("ms-cold", modelscope=True, warm=False),
    Row("ms-warm", modelscope=True),
    Row("ms-warm-api-servers", flags=TWO, modelscope=True),
    Row("hf-offline", offline=True),
    Row("ms-offline", modelscope=True, offline=True),
    Row("local-path", ""),
)


def publish(hub: FaultServer) -> None:
    """The repositories of every row."""
    tiny = tiny_model()
    hub.add("org/tiny", tiny)
    hub.add("org/words", {**tokenizer_files(), "config.json": tiny["config.json"]})
    hub.add("org/code", {"configuration_tiny.py": CONFIGURATION.encode(), "config.json": tiny["config.json"]})
    config = json.loads(tiny["config.json"]) | {"auto_map": {"AutoConfig": "org/code--configuration_tiny.TinyConfig"}}
    hub.add("org/coded", tiny | {"config.json": json.dumps(config).encode()})


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def launch(row: Row, scratch: Path) -> None:
    """Start the server, ask it something, stop it."""
    port = free_port()
    flags = [*FLAGS, *row.flags, "--host", "127.0.0.1", "--port", str(port)]
    command = [*vllm_command(), "serve", row.model, *flags]
    with ServerProcess(command, port, scratch / f"{row.name}.log", os.environ) as server:
        server.wait_ready(1800.0, lambda stage: None)
        body = json.dumps({"model": row.model, "prompt": "Hello", "max_tokens": 4}).encode()
        question = urllib.request.Request(server.base_url + "/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(question, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1


def count(row: Row, scratch: Path) -> Counter[str]:
    """Run one row against a hub of its own; requests by kind of process."""
    with FaultServer() as hub:
        publish(hub)
        variables = hub.environment(scratch / row.name) | {
            "VLLM_METAL_HUB_RESOLVED": "{}", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_MODELSCOPE": str(row.modelscope),
            "VLLM_METAL_HUB_TIMEOUT": "10",
        }  # fmt: skip
        with environment(**variables):
            if row.name == "local-path":
                from vllm_metal_hub import resolve

                row = Row(row.name, str(resolve("org/tiny").path))
            elif row.warm:
                from vllm_metal_hub import resolve

                resolve("org/tiny")
            os.environ["VLLM_METAL_HUB_RESOLVED"] = "{}"
            hub.forget()
            with environment(**({"HF_HUB_OFFLINE": "1"} if row.offline else {})):
                launch(row, scratch)
        return Counter("fetching" if "vllm_metal_hub.fetch" in r.command else r.command for r in hub.requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", choices=[[], *(row.name for row in ROWS)])
    wanted = parser.parse_args().rows
    bad = False
    print(f"{'launch':28} {'fetching process':>16} {'vLLM processes':>15}")
    with tempfile.TemporaryDirectory() as scratch:
        for row in ROWS:
            if wanted and row.name not in wanted:
                continue
            try:
                found = count(row, Path(scratch))
            except HubError as error:
                print(f"{row.name:28} did not come up: {error}", flush=True)
                bad = True
                continue
            fetching = found.pop("fetching", 0)
            print(f"{row.name:28} {fetching:16} {sum(found.values()):15}  {dict(found) or ''}", flush=True)
            bad |= bool(found) or (row.warm and fetching > 0)
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
