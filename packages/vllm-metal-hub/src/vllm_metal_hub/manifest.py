"""The record that makes a snapshot usable: written last, in one step, and checked at every start."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_metal_hub.checksum import digest_of
from vllm_metal_hub.file_selection import is_weight
from vllm_metal_hub.model_ref import ModelRef, Source
from vllm_metal_hub.snapshot import Check, FileEntry, LocalSnapshot, SnapshotSource, loader_path

SCHEMA = 1
SMALL = "small-files"
"""Selection of a snapshot without weights."""


@dataclass(frozen=True)
class Recorded:
    """One file as it was when its digest was known to be right."""

    entry: FileEntry
    mtime_ns: int


@dataclass(frozen=True)
class Manifest:
    """What was pulled, from where, and where it lies."""

    repo: str
    source: SnapshotSource
    endpoint: str
    revision: str
    selection: str  # what of the repository: "" for the model, else a quantisation or a file
    commit: str
    directory: Path
    files: tuple[Recorded, ...]
    check: Check = "hash"

    def snapshot(self, *, check: Check | None = None, fetched_bytes: int = 0) -> LocalSnapshot:
        """As loaders and users get it."""
        entries = tuple(recorded.entry for recorded in self.files)
        return LocalSnapshot(
            loader_path(self.directory, entries), self.repo, self.source, self.revision, self.commit,
            self.endpoint, entries, check or self.check, fetched_bytes,
        )  # fmt: skip

    def weight_digests(self) -> frozenset[str]:
        """SHA-256 of the files that hold tensors."""
        return frozenset(r.entry.digest for r in self.files if is_weight(r.entry.path) and r.entry.digest)


def record(directory: Path, entries: Mapping[str, FileEntry]) -> tuple[Recorded, ...]:
    """Note the times of files whose content was just verified."""
    return tuple(Recorded(entry, (directory / path).stat().st_mtime_ns) for path, entry in sorted(entries.items()))


def selection_of(ref: ModelRef) -> str:
    """What of a repository a reference means."""
    return SMALL if ref.small else ref.file or (ref.quant or "").upper()


def revision_of(revision: str | None) -> str:
    """One word for the default branch, which the hubs call main and master."""
    return "main" if revision in (None, "main", "master") else str(revision)


def manifest_path(home: Path, source: Source, ref: ModelRef) -> Path:
    """Where the manifest of a reference is, or would be."""
    parts = [ref.repo.replace("/", "--"), selection_of(ref).replace("/", "--")]
    name = "+".join(part for part in parts if part) + "@" + revision_of(ref.revision).replace("/", "--")
    return home / "manifests" / source / f"{name}.json"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Publish a manifest: readers see the old one or the new one, never a part."""
    content = {
        "schema": SCHEMA,
        "repo": manifest.repo,
        "source": manifest.source,
        "endpoint": manifest.endpoint,
        "revision": manifest.revision,
        "selection": manifest.selection,
        "commit": manifest.commit,
        "directory": str(manifest.directory),
        "check": manifest.check,
        "files": [
            {"path": r.entry.path, "size": r.entry.size, "digest": r.entry.digest, "mtime_ns": r.mtime_ns}
            for r in manifest.files
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    with os.fdopen(number, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest; None for none, a broken one, or one of another schema."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            return None
        files = tuple(Recorded(FileEntry(f["path"], f["size"], f["digest"]), f["mtime_ns"]) for f in content["files"])
        return Manifest(
            content["repo"], content["source"], content["endpoint"], content["revision"], content["selection"],
            content["commit"], Path(content["directory"]), files, content["check"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def manifests(home: Path) -> Iterator[tuple[Path, Manifest]]:
    """Every readable manifest under ``home``."""
    for path in sorted((home / "manifests").glob("*/*.json")):
        found = read_manifest(path)
        if found is not None:
            yield path, found


def problems(manifest: Manifest, *, full: bool = False) -> dict[str, str]:
    """Compare the files with the record: by size and time, and by digest where the time differs or ``full``.

    Returns what is wrong by file; empty when the snapshot is what was pulled.
    """
    wrong: dict[str, str] = {}
    for recorded in manifest.files:
        entry, file = recorded.entry, manifest.directory / recorded.entry.path
        try:
            stat = file.stat()
        except OSError:
            wrong[entry.path] = "missing"
            continue
        if stat.st_size != entry.size:
            wrong[entry.path] = f"{stat.st_size:,} bytes instead of {entry.size:,}"
        elif full or stat.st_mtime_ns != recorded.mtime_ns:
            actual = digest_of(file, entry.digest)
            if actual != entry.digest:
                wrong[entry.path] = f"{actual} instead of {entry.digest}"
    return wrong


def refreshed(path: Path, manifest: Manifest) -> None:
    """Write a verified manifest again with the files' present times, so that the next start need not hash."""
    entries = {r.entry.path: r.entry for r in manifest.files}
    present = record(manifest.directory, entries)
    if present != manifest.files:
        with contextlib.suppress(OSError):
            write_manifest(path, replace(manifest, files=present))
