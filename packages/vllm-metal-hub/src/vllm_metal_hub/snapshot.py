"""What a resolution returns: one local, complete snapshot of one model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SnapshotSource = Literal["local", "huggingface", "modelscope"]
Check = Literal["hash", "stat", "unverified"]


@dataclass(frozen=True)
class FileEntry:
    """One file of a repository, as its hub lists it.

    ``digest`` is ``"sha256:…"`` or, for small Hugging Face files, ``"git-sha1:…"``; empty where the hub
    publishes none.
    """

    path: str
    size: int
    digest: str = ""


@dataclass(frozen=True)
class LocalSnapshot:
    """A directory, or one .gguf file, that a loader may read and that nothing changes any more.

    ``commit`` is Hugging Face's commit, or ``tree-<sha256>`` of the file list on ModelScope; empty for a
    local path. ``check`` says how far its content is known to be the hub's: hashed, compared by size and
    time with what was hashed before, or not at all.
    """

    path: Path
    repo: str
    source: SnapshotSource
    requested_revision: str | None = None
    commit: str = ""
    endpoint: str | None = None
    files: tuple[FileEntry, ...] = ()
    check: Check = "unverified"
    fetched_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the files that the snapshot lists."""
        return sum(entry.size for entry in self.files)


def loader_path(directory: Path, files: tuple[FileEntry, ...]) -> Path:
    """What a loader is given: the directory, or the (first) .gguf file in it when that is what was chosen."""
    ggufs = sorted(entry.path for entry in files if entry.path.endswith(".gguf"))
    if ggufs and not any(entry.path.endswith(".safetensors") for entry in files):
        return directory / ggufs[0]
    return directory
