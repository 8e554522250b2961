"""Where the files of a pull go, and how they become a snapshot in one step."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_metal_hub.model_ref import Source
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.snapshot import FileEntry


@dataclass(frozen=True)
class HuggingFacePlacement:
    """Hugging Face's own cache layout, so that every tool shares the files."""

    folder: Path
    commit: str

    @property
    def directory(self) -> Path:
        """The snapshot that loaders read."""
        return self.folder / "snapshots" / self.commit

    def final(self, entry: FileEntry) -> Path:
        """Where the bytes of a file live: under their digest, shared by all revisions."""
        return self.folder / "blobs" / _name(entry)

    def part(self, entry: FileEntry) -> Path:
        """Where a file grows; named by its digest, so that any later pull continues it."""
        return self.folder / "blobs" / f"{_name(entry)}.vllm-metal.part"

    def publish(self, entries: tuple[FileEntry, ...], listing: tuple[FileEntry, ...], revision: str) -> None:
        """Link the files into the snapshot, keep the hub's listing, and let ``revision`` point here."""
        for entry in entries:
            pointer = self.directory / entry.path
            pointer.parent.mkdir(parents=True, exist_ok=True)
            if not (pointer.is_symlink() or pointer.exists()) or not _same(pointer, self.final(entry)):
                _link(self.final(entry), pointer)
        tree = {entry.path: _tree_entry(entry) for entry in listing}
        _write(self.folder / "trees" / f"{self.commit}.json", json.dumps({"format_version": 1, "files": tree}))
        if revision != self.commit:
            _write(self.folder / "refs" / revision, self.commit)


@dataclass(frozen=True)
class StorePlacement:
    """A directory of our own for one ModelScope tree, which nothing changes once it has its name."""

    directory: Path

    @property
    def _growing(self) -> Path:
        return self.directory.with_name(self.directory.name + ".partial")

    def final(self, entry: FileEntry) -> Path:
        """Where a verified file waits for the others, or lies for good."""
        root = self.directory if self.directory.exists() else self._growing
        return root / entry.path

    def part(self, entry: FileEntry) -> Path:
        """Where a file grows, whichever tree it is for."""
        return self.directory.parent / "parts" / f"{_name(entry)[:64]}-{_flat(entry.path)}"

    def publish(self, entries: tuple[FileEntry, ...], listing: tuple[FileEntry, ...], revision: str) -> None:
        """Give the complete directory its name; files that belong to no entry are left out."""
        if self.directory.exists():
            return
        wanted = {entry.path for entry in entries}
        for file in sorted(self._growing.rglob("*")):
            if file.is_file() and file.relative_to(self._growing).as_posix() not in wanted:
                file.unlink()
        os.replace(self._growing, self.directory)


Placement = HuggingFacePlacement | StorePlacement


def place(source: Source, settings: HubSettings, repo: str, commit: str) -> Placement:
    """The placement of one commit of one repository."""
    flat = repo.replace("/", "--")
    if source == "huggingface":
        return HuggingFacePlacement(settings.hf_cache / f"models--{flat}", commit)
    return StorePlacement(settings.home / "store" / "modelscope" / flat / commit)


def tree_commit(files: Iterable[FileEntry]) -> str:
    """A name for exactly these files: ModelScope's listings carry no commit."""
    lines = sorted(f"{entry.path}\0{entry.digest}\0{entry.size}\n" for entry in files)
    return "tree-" + hashlib.sha256("".join(lines).encode()).hexdigest()[:40]


def _name(entry: FileEntry) -> str:
    return entry.digest.split(":")[-1] or _flat(entry.path)


def _flat(path: str) -> str:
    return path.replace("/", "--")


def _same(pointer: Path, blob: Path) -> bool:
    return pointer.exists() and pointer.samefile(blob)


def _link(blob: Path, pointer: Path) -> None:
    """Point at the blob; where a volume has no symbolic links, copy it."""
    temporary = pointer.with_name(pointer.name + ".link")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        shutil.copyfile(blob, temporary)
    os.replace(temporary, pointer)


def _tree_entry(entry: FileEntry) -> dict[str, object]:
    kind, _, value = entry.digest.partition(":")
    if kind == "sha256":
        return {"size": entry.size, "blob_id": value[:40], "lfs_sha256": value, "lfs_size": entry.size}
    return {"size": entry.size, "blob_id": value}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
