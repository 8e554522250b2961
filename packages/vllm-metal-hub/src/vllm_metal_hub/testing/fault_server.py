"""One loopback server that speaks Hugging Face's and ModelScope's protocols, and its storage on another port."""

import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_metal_hub.testing.faults import Fault, FaultPlan
from vllm_metal_hub.testing.repository import Repository
from vllm_metal_hub.testing.responses import HubRequest, LoggedRequest


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, state: "FaultServer") -> None:
        self.state = state
        super().__init__(("127.0.0.1", 0), HubRequest)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that break off are part of the plan."""


class FaultServer:
    """Both hubs on one port; large files redirect to a second port, as the real ones do to their storage.

    A context manager. ``requests`` lists what was asked, with the process that asked.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[LoggedRequest] = []
        self.faults = FaultPlan()
        self._hub, self._storage = _Server(self), _Server(self)
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> "FaultServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving; from now on connections are refused."""
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT and MODELSCOPE_ENDPOINT."""
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def storage_url(self) -> str:
        """Where large files are redirected to: another port, and another name, as cookies do not look at ports."""
        return f"http://localhost:{self._storage.server_port}"

    def add(self, repo: str, files: dict[str, bytes], *, gate: str | None = None) -> Repository:
        """Publish a repository under ``owner/name`` on both hubs."""
        self.repositories[repo] = Repository(files, gate)
        return self.repositories[repo]

    def fail(self, *faults: Fault) -> None:
        """Misbehave from now on."""
        for fault in faults:
            self.faults.add(fault)

    def forget(self) -> None:
        """Behave well, and forget what was asked."""
        self.faults.clear()
        self.requests.clear()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that point every client at this server and every cache below ``home``."""
        return {
            "HOME": str(home),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "hf"),
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_CACHE": str(home / "ms"),
            "MODELSCOPE_HOME": str(home / "ms-home"),
            "VLLM_METAL_HUB_HOME": str(home / "hub"),
            "VLLM_METAL_HUB_TIMEOUT": "1",
            "NO_PROXY": "*",
        }
