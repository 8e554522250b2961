"""A model repository as both hubs would show it."""

import hashlib
import json
import struct
from dataclasses import dataclass, field
from functools import lru_cache

LARGE = (".safetensors", ".bin", ".pth", ".gguf", ".npz")


@dataclass
class Repository:
    """Files by path; replace ``files`` to make a new commit.

    ``gate`` is the token that a gated repository wants, None for a public one.
    """

    files: dict[str, bytes]
    gate: str | None = None
    tags: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, a tag or a commit; None where there is no such revision."""
        if revision in ("main", "master", commit_of(self.files)):
            return self.files
        return next((f for name, f in self.tags.items() if revision in (name, commit_of(f))), None)


def commit_of(files: dict[str, bytes]) -> str:
    """A commit id that depends on the content only."""
    state = hashlib.sha1(usedforsecurity=False)
    for path, content in sorted(files.items()):
        state.update(f"{path}\0{sha256(content)}\n".encode())
    return state.hexdigest()


@lru_cache(maxsize=64)
def sha256(content: bytes) -> str:
    """As hubs give it for large files; kept, since every answer names it."""
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=64)
def git_sha1(content: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def safetensors(name: str, nbytes: int, fill: int = 0) -> bytes:
    """A small valid safetensors file with one tensor of bytes; the content differs with ``fill``."""
    header = json.dumps({name: {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    block = bytes((i * 7 + fill) % 251 for i in range(251))
    return struct.pack("<Q", len(header)) + header + (block * (nbytes // 251 + 1))[:nbytes]
