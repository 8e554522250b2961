"""Reading the cache that huggingface_hub keeps, without importing it and without the network."""

import json
from dataclasses import dataclass
from pathlib import Path

from vllm_metal_hub import file_selection
from vllm_metal_hub.errors import HubError
from vllm_metal_hub.model_ref import ModelRef
from vllm_metal_hub.snapshot import FileEntry

DEFAULT_BRANCHES = (None, "main", "master")


@dataclass(frozen=True)
class CachedSnapshot:
    """One snapshot in a Hugging Face cache.

    ``problem`` is empty when every file that a loader needs is there with its size; ``files`` carry
    digests only where the cache kept the hub's listing.
    """

    path: Path
    commit: str
    files: tuple[FileEntry, ...]
    problem: str = ""


def find_snapshot(cache: Path, ref: ModelRef, revision: str | None) -> CachedSnapshot | None:
    """The snapshot that ``revision`` (None: the default branch) points to, or None where there is none."""
    folder = cache / ("models--" + ref.repo.replace("/", "--"))
    commit = _commit(folder, revision)
    if commit is None or not (folder / "snapshots" / commit).is_dir():
        return None
    path = folder / "snapshots" / commit
    listing = _listing(folder / "trees" / f"{commit}.json")
    files, problem = _needed(ref, path, listing)
    return CachedSnapshot(path, commit, files, problem)


def _commit(folder: Path, revision: str | None) -> str | None:
    names = [name for name in DEFAULT_BRANCHES if name] if revision in DEFAULT_BRANCHES else [revision]
    for name in names:
        reference = folder / "refs" / str(name)
        if reference.is_file():
            return reference.read_text().strip()
    if revision in DEFAULT_BRANCHES:
        return None
    return revision if (folder / "snapshots" / str(revision)).is_dir() else None


def _listing(path: Path) -> tuple[FileEntry, ...] | None:
    try:
        files = json.loads(path.read_text())["files"]
        return tuple(_entry(name, facts) for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _entry(name: str, facts: dict[str, object]) -> FileEntry:
    sha256 = facts.get("lfs_sha256")
    digest = f"sha256:{sha256}" if sha256 else f"git-sha1:{facts['blob_id']}"
    return FileEntry(name, int(str(facts.get("lfs_size") or facts["size"])), digest)


def _needed(ref: ModelRef, path: Path, listing: tuple[FileEntry, ...] | None) -> tuple[tuple[FileEntry, ...], str]:
    here = tuple(
        FileEntry(file.relative_to(path).as_posix(), file.stat().st_size)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    )
    index = path / file_selection.INDEX
    index_text = index.read_text() if index.is_file() else None
    try:
        files = file_selection.select(ref, here if listing is None else listing, index_text)
    except HubError as error:
        return (), str(error)
    sizes = {entry.path: entry.size for entry in here}
    for entry in files:
        if entry.path not in sizes:
            return files, f"{entry.path} is missing"
        if sizes[entry.path] != entry.size:
            return files, f"{entry.path} has {sizes[entry.path]:,} bytes instead of {entry.size:,}"
    if listing is None and file_selection.INDEX not in sizes and _first_of_several(files):
        return files, "its weight index is missing"
    if file_selection.needs_config(ref, files) and not (path / "config.json").is_file():
        return files, "config.json is missing"
    return files, ""


def _first_of_several(files: tuple[FileEntry, ...]) -> bool:
    return any("-of-" in entry.path and entry.path.endswith(".safetensors") for entry in files)
