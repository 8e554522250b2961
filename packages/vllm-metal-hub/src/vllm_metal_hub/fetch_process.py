"""Starting the fetching process, and turning what it says into progress, results and errors."""

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

from vllm_metal_hub import errors
from vllm_metal_hub.errors import HubError, NetworkError
from vllm_metal_hub.events import OnEvent
from vllm_metal_hub.fetch_request import Request, request_line
from vllm_metal_hub.settings import HubSettings

_KINDS: dict[str, type[HubError]] = {
    kind.__name__: kind
    for kind in (
        errors.HubError, errors.UsageError, errors.NotFoundError, errors.GatedError, errors.OfflineError,
        errors.IntegrityError, errors.NetworkError, errors.DiskFullError,
    )
}  # fmt: skip


def run_fetch(
    request: Request, settings: HubSettings, on_event: OnEvent, *, limit_s: float | None = None
) -> dict[str, Any]:
    """Run one request in a process of its own, for at most ``limit_s`` seconds.

    ``on_event`` hears everything but the last event.

    Raises:
        HubError: the kind that the process ended with; NetworkError if it ended without a word.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_metal_hub.fetch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=fetch_environment(settings),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    timer = threading.Timer(limit_s or threading.TIMEOUT_MAX, process.kill)
    timer.daemon = True
    timer.start()
    started = time.monotonic()
    try:
        process.stdin.write(request_line(request))
        process.stdin.flush()
        last: dict[str, Any] = {}
        for line in process.stdout:
            last = json.loads(line)
            if last["event"] not in ("result", "error"):
                on_event(last)
        if last.get("event") == "result":
            return last
        if last.get("event") == "error":
            raise _KINDS.get(last["kind"], HubError)(last["text"])
        if limit_s is not None and time.monotonic() - started >= limit_s:
            endpoint = settings.endpoint(request.source)
            raise NetworkError(f"[pull] expected an answer of {endpoint} within {limit_s:.0f} s, got none. Try later.")
        said = (process.stderr.read().strip().splitlines() or ["nothing"])[-1]
        raise HubError(f"[pull] expected a result of the fetching process, got: {said}. Please report this.")
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def fetch_environment(settings: HubSettings) -> dict[str, str]:
    """The environment of the fetching process: the user's, with time limits where the libraries have none."""
    env = dict(os.environ)
    seconds = str(max(1, round(settings.timeout_s)))
    defaults = {
        "HF_HUB_ETAG_TIMEOUT": seconds,
        "HF_HUB_DOWNLOAD_TIMEOUT": seconds,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",  # files come over plain HTTP, through the endpoint that the user chose
        "MODELSCOPE_API_TIMEOUT": seconds,
        "MODELSCOPE_API_CONNECT_TIMEOUT": seconds,
        "MODELSCOPE_DOWNLOAD_TIMEOUT": seconds,
        "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": seconds,
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": str(settings.retries),
    }
    for name, value in defaults.items():
        env.setdefault(name, value)
    env.update(
        {
            "VLLM_METAL_HUB_HOME": str(settings.home),
            "VLLM_METAL_HUB_TIMEOUT": str(settings.timeout_s),
            "VLLM_METAL_HUB_RETRIES": str(settings.retries),
            "HF_HUB_CACHE": str(settings.hf_cache),
        }
    )
    env.pop("HF_HUB_OFFLINE", None)  # whoever starts this process has decided to use the network
    env.pop("TRANSFORMERS_OFFLINE", None)
    return env
