"""Digests as the hubs publish them, and comparing files with them."""

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

_CHUNK = 1 << 22


@runtime_checkable
class Hash(Protocol):
    """What hashlib's objects have."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest so far."""
        ...


def start_hash(digest: str, size: int) -> Hash:
    """A hash object for a digest such as ``sha256:…`` or ``git-sha1:…`` of a file of ``size`` bytes.

    Git hashes a header with the size before the content. An empty digest gives SHA-256, to be recorded.
    """
    if digest.startswith("git-sha1:"):
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.sha256()


def digest_of(path: Path, like: str) -> str:
    """The digest of a file in the same algorithm as ``like``."""
    state = start_hash(like, path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_CHUNK):
            state.update(block)
    return f"{algorithm(like)}:{state.hexdigest()}"


def algorithm(digest: str) -> str:
    """The algorithm's name in a digest; SHA-256 where there is none."""
    return digest.split(":", maxsplit=1)[0] if digest else "sha256"
