"""What the fetching process asks of a hub, whatever its library."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vllm_metal_hub.snapshot import FileEntry


class TransientError(Exception):
    """Worth another try: no answer, a broken connection, 408, 429 or 5xx.

    ``retry_after_s`` is what the hub asked for, if it did.
    """

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Listing:
    """All files of one repository at one commit."""

    commit: str
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class ByteStream:
    """A body that starts at byte ``start`` of its file, whatever was asked for."""

    start: int
    chunks: Iterator[bytes]


@runtime_checkable
class Hub(Protocol):
    """One hub. Every call raises TransientError, or a HubError that no retry would cure."""

    endpoint: str

    def commit(self, repo: str, revision: str | None) -> str | None:
        """Return the commit that ``revision`` is now; None, without a request, where a hub has no such thing."""
        ...

    def list_files(self, repo: str, revision: str | None) -> Listing:
        """Return the files of ``revision`` (None: the default branch)."""
        ...

    def open(self, repo: str, commit: str, path: str, start: int) -> AbstractContextManager[ByteStream]:
        """Open one file at byte ``start``; the stream says where the server really started."""
        ...


def start_of(status: int, content_range: str | None) -> int:
    """The byte that a response starts at: a server may ignore a Range header and answer 200."""
    if status != 206 or not content_range:
        return 0
    return int(content_range.removeprefix("bytes ").split("-")[0])


def seconds_of(retry_after: str | None) -> float | None:
    """Read a Retry-After header that counts seconds; dates are ignored, since clocks differ."""
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None
