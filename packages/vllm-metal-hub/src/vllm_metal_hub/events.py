"""What the fetching process tells its parent, one JSON object a line."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm_metal_hub.snapshot import FileEntry

OnEvent = Callable[[dict[str, Any]], None]

_BYTES_EVERY_S = 0.1


def silent(event: dict[str, Any]) -> None:
    """Hear nothing."""


class EventWriter:
    """Writes events to a file descriptor; safe to share between threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._written = time.monotonic()

    def _write(self, **event: Any) -> None:
        with self._lock:
            os.write(self._descriptor, (json.dumps(event) + "\n").encode())

    def note(self, text: str) -> None:
        """Something that people should see: a retry, a wait, a repair."""
        self._write(event="note", text=text)

    def plan(self, entries: Iterable[FileEntry], missing: Iterable[FileEntry]) -> None:
        """What the snapshot has, and what of it has to be fetched."""
        files, fetch = list(entries), list(missing)
        self._write(
            event="plan", files=len(files), bytes=sum(e.size for e in files),
            fetch_files=len(fetch), fetch_bytes=sum(e.size for e in fetch),
        )  # fmt: skip

    def start(self, entry: FileEntry) -> None:
        """A file is in flight."""
        self._write(event="start", path=entry.path, size=entry.size)

    def bytes(self, entry: FileEntry, count: int) -> None:
        """Bytes that count arrived; written a few times a second."""
        with self._lock:
            self._counts[entry.path] = self._counts.get(entry.path, 0) + count
            now = time.monotonic()
            if now - self._written < _BYTES_EVERY_S:
                return
            self._written, counts, self._counts = now, self._counts, {}
        self._write(event="bytes", counts=counts)

    def done(self, entry: FileEntry) -> None:
        """A file is complete and verified."""
        with self._lock:
            counts, self._counts = self._counts, {}
        self._write(event="bytes", counts=counts)
        self._write(event="done", path=entry.path)

    def result(self, result: dict[str, Any]) -> None:
        """The last event of a request that succeeded."""
        self._write(event="result", **result)

    def error(self, kind: str, text: str) -> None:
        """The last event of one that did not; ``kind`` is the error's class name."""
        self._write(event="error", kind=kind, text=text)
