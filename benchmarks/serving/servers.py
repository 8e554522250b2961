"""Start the servers that the serving benchmarks compare, and stop them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    """Return a loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, ready: str, timeout_s: float = 300) -> Iterator[str]:
    """Run ``command`` until the block ends; yields the base URL once ``ready`` answers."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + timeout_s
            while not answers(f"http://127.0.0.1:{port}{ready}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} did not come up; see {log}:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def answers(url: str) -> bool:
    """Return whether ``url`` gives HTTP 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def vllm_serve(model: Path, log: Path, *extra: str) -> contextlib.AbstractContextManager[str]:
    """`vllm serve` with this project's plugin."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "model", "--max-model-len", "2048", *extra]
    return running(command, port, log, "/health")


def mlx_lm_server(model: Path, log: Path) -> contextlib.AbstractContextManager[str]:
    """mlx-lm's own server on the same weights, with the BLAS that the plugin uses."""
    port = free_port()
    start = "from metal_kernels.blas import prefer_fast_blas; prefer_fast_blas(); import mlx_lm.server as s; s.main()"
    command = [sys.executable, "-c", start, "--model", str(model), "--port", str(port)]
    return running([*command, "--host", "127.0.0.1"], port, log, "/health")
