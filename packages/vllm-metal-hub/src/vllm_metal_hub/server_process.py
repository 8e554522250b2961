"""One ``vllm serve`` of our own: started, watched, and surely gone afterwards."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from vllm_metal_hub.errors import HubError
from vllm_metal_hub.server_log import ServerLog

HOST = "127.0.0.1"
_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy


class ServerStoppedError(HubError):
    """The server ended before it answered; ``str()`` is its reason."""


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Tell whether a server could listen on ``port``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def vllm_command() -> list[str]:
    """How this Python's ``vllm`` is started: its script if it is installed beside us, else its module."""
    script = Path(sys.executable).parent / "vllm"
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


class ServerProcess:
    """A server in a session of its own, so that Ctrl-C reaches us first and no child outlives us.

    A context manager: leaving it stops the server and everything that it started.
    """

    def __init__(self, command: Sequence[str], port: int, log_path: Path, env: Mapping[str, str]) -> None:
        self.port = port
        self.log = ServerLog()
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as sink:
            self._process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=dict(env), start_new_session=True,
            )  # fmt: skip
        self._lines = log_path.open(errors="replace")
        self._partial = ""

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        """Where the OpenAI-compatible API is."""
        return f"http://{HOST}:{self.port}/v1"

    def read_log(self) -> bool:
        """Read what the server printed since the last call; tell whether its stage changed."""
        changed = False
        text = self._partial + self._lines.read()
        *lines, self._partial = text.replace("\r", "\n").split("\n")
        for line in lines:
            changed |= self.log.feed(line)
        return changed

    def wait_ready(self, timeout_s: float, on_stage: Callable[[str], None]) -> None:
        """Return when the server answers; ``on_stage`` hears what it does meanwhile.

        Raises:
            ServerStoppedError: it ended, or was not up after ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        on_stage(self.log.stage)
        while time.monotonic() < deadline:
            if self.read_log():
                on_stage(self.log.stage)
            self.check_alive()
            if self._answers():
                self.read_log()
                return
            time.sleep(0.2)
        raise ServerStoppedError(
            f"[serve] expected an answer within {timeout_s:.0f} s, got none; it was {self.log.stage}. "
            f"Raise --timeout, or read {self.log_path}."
        )

    def check_alive(self) -> None:
        """Raise ServerStoppedError with the server's own reason if it has ended."""
        code = self._process.poll()
        if code is None:
            return
        self.read_log()
        self.log.feed(self._partial)
        ended = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        raise ServerStoppedError(f"[serve] expected a running server, got {ended}: {self.log.reason()}")

    def _answers(self) -> bool:
        try:
            with _OPEN.open(f"http://{HOST}:{self.port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self, grace_s: float = 20.0) -> None:
        """End the server: SIGTERM, then SIGKILL for whatever of its session is left after ``grace_s``."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        deadline = time.monotonic() + 5.0
        while _group_lives(self._process.pid) and self._process.poll() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        if _group_lives(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._lines.close()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
