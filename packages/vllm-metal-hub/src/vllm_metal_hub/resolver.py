"""From what the user typed to one local path, once per launch, shared by every process of it."""

import json
import os
from pathlib import Path

from vllm_metal_hub import huggingface_cache
from vllm_metal_hub.errors import NotFoundError, OfflineError
from vllm_metal_hub.model_ref import ModelRef, parse
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.snapshot import FileEntry, LocalSnapshot, SnapshotSource

RESOLVED = "VLLM_METAL_HUB_RESOLVED"


def resolve(ref: str, *, revision: str | None = None, settings: HubSettings | None = None) -> LocalSnapshot:
    """Return the local snapshot that ``ref`` means, and let child processes inherit the answer.

    The order is: a local path; what a parent process resolved; the Hugging Face cache.

    Raises:
        UsageError: ``ref`` cannot be read.
        NotFoundError: a local path that does not exist.
        OfflineError: not on this machine.
    """
    parsed = parse(ref, revision)
    if parsed.path is not None:
        return _local(parsed)
    inherited = _inherited(parsed)
    if inherited is not None:
        return inherited
    snapshot = _cached(parsed, settings or HubSettings.from_env())
    hand_down(parsed, snapshot)
    return snapshot


def _local(ref: ModelRef) -> LocalSnapshot:
    assert ref.path is not None
    if not ref.path.exists():
        raise NotFoundError(f"[model] expected a file or directory at {ref.path}, got none. Check the path.")
    return LocalSnapshot(ref.path, str(ref.path), "local")


def _key(ref: ModelRef) -> str:
    scheme = {None: "", "huggingface": "hf://", "modelscope": "ms://"}[ref.source]
    return f"{scheme}{ref.label}@{ref.revision or ''}"


def _table() -> dict[str, dict[str, str]]:
    try:
        table = json.loads(os.environ.get(RESOLVED) or "{}")
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _inherited(ref: ModelRef) -> LocalSnapshot | None:
    known = _table().get(_key(ref))
    if known is None or not Path(known["path"]).exists():
        return None
    source: SnapshotSource = "modelscope" if known.get("source") == "modelscope" else "huggingface"
    return LocalSnapshot(
        Path(known["path"]), ref.repo, source, ref.revision, known.get("commit", ""), check="stat"
    )  # fmt: skip


def hand_down(ref: ModelRef, snapshot: LocalSnapshot) -> None:
    """Put the answer into this process's environment, which every child of it inherits."""
    known = {"path": str(snapshot.path), "source": snapshot.source, "commit": snapshot.commit}
    os.environ[RESOLVED] = json.dumps({**_table(), _key(ref): known})


def _cached(ref: ModelRef, settings: HubSettings) -> LocalSnapshot:
    found = huggingface_cache.find_snapshot(settings.hf_cache, ref, ref.revision)
    if found is None or found.problem:
        state = f"incomplete ({found.problem})" if found else "not there"
        raise OfflineError(
            f"[model] expected {ref.label}@{ref.revision or 'main'} on this machine, got: "
            f"in {settings.hf_cache} it is {state}. "
            f"Run `hf download {ref.repo}` where there is a network, or pass a local path."
        )
    return LocalSnapshot(
        loader_path(found.path, found.files), ref.repo, "huggingface", ref.revision, found.commit,
        files=found.files, check="stat",
    )  # fmt: skip


def loader_path(directory: Path, files: tuple[FileEntry, ...]) -> Path:
    """What a loader is given: the directory, or the (first) .gguf file in it when that is what was chosen."""
    ggufs = sorted(entry.path for entry in files if entry.path.endswith(".gguf"))
    if ggufs and not any(entry.path.endswith(".safetensors") for entry in files):
        return directory / ggufs[0]
    return directory
