"""One file that carries a snapshot to a machine without network, and back into a store there."""

import io
import os
import tarfile
import tempfile
from pathlib import Path

from vllm_metal_hub import file_selection
from vllm_metal_hub.checksum import digest_of
from vllm_metal_hub.errors import IntegrityError, UsageError
from vllm_metal_hub.manifest import Manifest, manifest_path, read_manifest, record, write_manifest
from vllm_metal_hub.model_ref import ModelRef, Source
from vllm_metal_hub.placement import tree_commit
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.snapshot import FileEntry
from vllm_metal_hub.store import Installed

_RECORD = "vllm-metal-snapshot.json"


def export_snapshot(item: Installed, target: Path) -> None:
    """Write a tar archive of a snapshot: its record first, then its files.

    The archive appears under its name only when it is complete.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        with tarfile.open(partial, "w", dereference=True) as archive:
            archive.add(item.manifest_path, _RECORD)
            for recorded in item.manifest.files:
                archive.add(item.manifest.directory / recorded.entry.path, f"files/{recorded.entry.path}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def import_archive(path: Path, settings: HubSettings) -> Manifest:
    """Unpack an archive into the store, verify every file against the record, and make it usable.

    Raises:
        UsageError: not an archive of ``vllm-metal export``.
        IntegrityError: a file differs from the record.
    """
    root = settings.home / "store" / "imported"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".import-") as scratch, _open(path) as archive:
        found = _read_record(archive, Path(scratch), path)
        entries = {recorded.entry.path: recorded.entry for recorded in found.files}
        file_selection.check_names(entries.values())
        unpacked = Path(scratch) / "files"
        for name, entry in entries.items():
            _unpack(archive, name, unpacked / name)
            actual = digest_of(unpacked / name, entry.digest)
            if actual != entry.digest:
                raise IntegrityError(f"[import] expected {name} with {entry.digest}, got {actual}. Copy {path} again.")
        directory = root / found.repo.replace("/", "--") / found.commit
        _move(unpacked, directory)
    return _publish(settings, found, directory, entries)


def import_directory(path: Path, ref: ModelRef, settings: HubSettings) -> Manifest:
    """Make a local directory usable under a hub's name, as it is and where it is; it is hashed once.

    Raises:
        UsageError: no directory, or one without a model.
    """
    if not path.is_dir():
        raise UsageError(f"[import] expected a directory or an archive, got {path}. Check the path.")
    here = [
        FileEntry(file.relative_to(path).as_posix(), file.stat().st_size)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    ]
    index = path / file_selection.INDEX
    chosen = file_selection.select(ref, here, index.read_text() if index.is_file() else None)
    entries = {e.path: FileEntry(e.path, e.size, digest_of(path / e.path, "")) for e in chosen}
    source: Source = ref.source or settings.sources[0]
    found = Manifest(
        ref.repo, source, "", ref.revision or "main", ref.file or (ref.quant or "").upper(),
        tree_commit(entries.values()), path.resolve(), record(path, entries), "unverified",
    )  # fmt: skip
    write_manifest(manifest_path(settings.home, source, ref), found)
    return found


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"[import] expected an archive of `vllm-metal export`, got {path}: {error}.") from error


def _read_record(archive: tarfile.TarFile, scratch: Path, path: Path) -> Manifest:
    try:
        member = archive.extractfile(_RECORD)
        content = member.read() if member is not None else b""
    except KeyError:
        content = b""
    (scratch / _RECORD).write_bytes(content)
    found = read_manifest(scratch / _RECORD)
    if found is None:
        raise UsageError(f"[import] expected an archive of `vllm-metal export`, got {path}, which has no record.")
    return found


def _unpack(archive: tarfile.TarFile, name: str, target: Path) -> None:
    try:
        source = archive.extractfile(f"files/{name}")
    except KeyError:
        source = None
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as sink:
        stream = source or io.BytesIO()
        while block := stream.read(1 << 22):
            sink.write(block)


def _move(unpacked: Path, directory: Path) -> None:
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unpacked, directory)


def _publish(settings: HubSettings, found: Manifest, directory: Path, entries: dict[str, FileEntry]) -> Manifest:
    gguf = found.selection.endswith(".gguf")
    ref = ModelRef(
        found.repo, repo=found.repo, revision=found.revision,
        quant=None if gguf else found.selection or None, file=found.selection if gguf else None,
    )  # fmt: skip
    placed = Manifest(
        found.repo, found.source, found.endpoint, found.revision, found.selection, found.commit, directory,
        record(directory, entries), found.check,
    )  # fmt: skip
    source: Source = "modelscope" if found.source == "modelscope" else "huggingface"
    write_manifest(manifest_path(settings.home, source, ref), placed)
    return placed
