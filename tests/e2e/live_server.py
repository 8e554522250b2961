"""Start the real server for a test, and end it whatever happens."""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """The caller's environment without anything that would help the launch along."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "HF_", "MLX_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **extra}


@functools.cache
def nameless_host() -> tuple[str, ...]:
    """Words before a command that give it a hostname that does not resolve; none where this machine refuses that."""
    if shutil.which("unshare") is None:
        return ()
    inside = ("unshare", "--uts", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")))
    words = (*inside, "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh")
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        return ()
    lookup = "import socket; socket.gethostbyname(socket.gethostname())"
    assert subprocess.run([*words, sys.executable, "-c", lookup], capture_output=True).returncode != 0
    return words


def processes_of_group(group: int) -> list[int]:
    """Live (not zombie) processes of one process session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == group and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", timeout=120, max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key="none", timeout=300, max_retries=0)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self, timeout_s: float = 600) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.3)


@contextlib.contextmanager
def serving(
    model: str | Path, log: Path, *flags: str, prefix: tuple[str, ...] = (), **variables: str
) -> Iterator[Server]:
    """Run ``vllm serve`` in a process session of its own and end it afterwards."""
    port = free_port()
    command = [*prefix, *VLLM, "serve", str(model), "--port", str(port), "--host", "127.0.0.1", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(**variables),
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        server.wait_ready()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for pid in processes_of_group(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def assert_sigterm_ends_every_process(server: Server) -> None:
    """Soon, although a client reads a stream that goes on for long: one hundred texts, a few at a time."""
    client = server.client()
    [model] = client.models.list()
    assert len(processes_of_group(server.process.pid)) > 1
    stream = client.completions.create(
        model=model.id, prompt="Once", max_tokens=200, n=100, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(15)
    while processes_of_group(server.process.pid) and time.monotonic() - start < 15:
        time.sleep(0.1)
    assert time.monotonic() - start < 10
    assert processes_of_group(server.process.pid) == []
