"""Reading the cache that ModelScope's tools keep, in its present and its older layouts, without the network."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from vllm_metal_hub import file_selection
from vllm_metal_hub.checksum import digest_of
from vllm_metal_hub.errors import HubError
from vllm_metal_hub.model_ref import ModelRef
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.snapshot import FileEntry


def directories(settings: HubSettings, repo: str, revision: str) -> Iterator[Path]:
    """Directories that may hold ``repo``, most trustworthy first; none of them says of itself that it is complete."""
    owner, _, name = repo.partition("/")
    flat, dots = f"{owner}--{name}", name.replace(".", "___")
    for root in (settings.modelscope_import, settings.modelscope_cache):
        if root is None:
            continue
        candidates = [
            root / "models" / flat / "snapshots" / revision,
            *(root / prefix / owner / n for prefix in ("hub/models", "models", "hub", "") for n in (name, dots)),
        ]
        yield from (path for path in dict.fromkeys(candidates) if path.is_dir())


def complete_files(ref: ModelRef, directory: Path) -> tuple[FileEntry, ...]:
    """The files that a loader needs, hashed here; they must be consistent with each other.

    Raises:
        HubError: something is missing or cut short.
    """
    here = [
        FileEntry(path.relative_to(directory).as_posix(), path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.endswith(".incomplete") and ".lock" not in path.parts
    ]
    index = directory / file_selection.INDEX
    entries = file_selection.select(ref, here, index.read_text() if index.is_file() else None)
    if not index.is_file() and sum("-of-" in e.path for e in entries if e.path.endswith(".safetensors")):
        raise HubError("its weight index is missing")
    for entry in entries:
        if entry.path.endswith(".safetensors"):
            _check_length(directory / entry.path)
    if file_selection.needs_config(ref, entries) and not (directory / "config.json").is_file():
        raise HubError("config.json is missing")
    return tuple(FileEntry(e.path, e.size, digest_of(directory / e.path, "")) for e in entries)


def _check_length(path: Path) -> None:
    """Compare a safetensors file with the length that its own header announces."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
            end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise HubError(f"{path.name} is no safetensors file") from error
    if size != 8 + length + end:
        raise HubError(f"{path.name} has {size:,} bytes instead of {8 + length + end:,}")
