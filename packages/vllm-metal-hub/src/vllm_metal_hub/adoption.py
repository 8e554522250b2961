"""Using what Hugging Face's and ModelScope's own tools downloaded before, after checking it."""

import contextlib
import os
import shutil
from dataclasses import replace

from vllm_metal_hub import huggingface_cache, modelscope_cache
from vllm_metal_hub.checksum import digest_of
from vllm_metal_hub.errors import HubError, NotFoundError
from vllm_metal_hub.manifest import (
    Manifest,
    manifest_path,
    record,
    revision_of,
    selection_of,
    write_manifest,
)
from vllm_metal_hub.model_ref import ModelRef, Source
from vllm_metal_hub.placement import StorePlacement, place, tree_commit
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.snapshot import Check, FileEntry, LocalSnapshot


def candidates(source: Source, ref: ModelRef, settings: HubSettings) -> tuple[str, ...]:
    """Directories whose files may be taken instead of downloading them, when their digests are right."""
    found = [str(path) for path in modelscope_cache.directories(settings, ref.repo, _branch(ref))]
    if source == "modelscope":
        cached = huggingface_cache.find_snapshot(settings.hf_cache, ref, ref.revision)
        found += [str(cached.path)] if cached else []
    return tuple(found)


def _branch(ref: ModelRef) -> str:
    revision = revision_of(ref.revision)
    return "master" if revision == "main" else revision


def adopt_huggingface(ref: ModelRef, settings: HubSettings) -> LocalSnapshot | None:
    """A complete snapshot of the Hugging Face cache whose kept listing lets us verify every byte, or None.

    It is hashed once; from then on the manifest answers.
    """
    found = huggingface_cache.find_snapshot(settings.hf_cache, ref, ref.revision)
    if found is None or found.problem or not all(entry.digest for entry in found.files):
        return None
    for entry in found.files:
        if digest_of(found.path / entry.path, entry.digest) != entry.digest:
            return None
    return _record(ref, settings, found, "hash")


def _record(
    ref: ModelRef, settings: HubSettings, found: huggingface_cache.CachedSnapshot, check: Check
) -> LocalSnapshot:
    entries = {e.path: e for e in found.files}
    manifest = Manifest(
        ref.repo, "huggingface", settings.hf_endpoint, revision_of(ref.revision), selection_of(ref),
        found.commit, found.path, record(found.path, entries), check,
    )  # fmt: skip
    with contextlib.suppress(OSError):  # a read-only home only costs hashing again
        write_manifest(manifest_path(settings.home, "huggingface", ref), manifest)
    return manifest.snapshot()


def adopt_unverified(source: Source, ref: ModelRef, settings: HubSettings) -> LocalSnapshot:
    """Offline: the best copy of another tool that is at least complete and consistent in itself.

    Raises:
        NotFoundError: there is none; the text says what is there instead.
    """
    return _offline_huggingface(ref, settings) if source == "huggingface" else _offline_modelscope(ref, settings)


def _offline_huggingface(ref: ModelRef, settings: HubSettings) -> LocalSnapshot:
    found = huggingface_cache.find_snapshot(settings.hf_cache, ref, ref.revision)
    if found is None:
        raise NotFoundError(f"it is not in {settings.hf_cache}")
    if found.problem:
        raise NotFoundError(f"the copy in {settings.hf_cache} is incomplete: {found.problem}")
    if all(entry.digest for entry in found.files):
        raise NotFoundError(f"the copy in {settings.hf_cache} differs from the hub's listing")
    hashed = tuple(replace(e, digest=digest_of(found.path / e.path, e.digest)) for e in found.files)
    return _record(ref, settings, replace(found, files=hashed), "unverified")


def _offline_modelscope(ref: ModelRef, settings: HubSettings) -> LocalSnapshot:
    said = f"it is not in {settings.modelscope_cache}"
    for directory in modelscope_cache.directories(settings, ref.repo, _branch(ref)):
        try:
            entries = modelscope_cache.complete_files(ref, directory)
        except HubError as error:
            said = f"the copy in {directory} is incomplete: {error}"
            continue
        return _copy_to_store(ref, settings, str(directory), entries)
    raise NotFoundError(said)


def _copy_to_store(
    ref: ModelRef, settings: HubSettings, directory: str, entries: tuple[FileEntry, ...]
) -> LocalSnapshot:
    """Give a loader a directory with exactly these files: the original is a branch, which later pulls change."""
    commit = tree_commit(entries)
    placement = place("modelscope", settings, ref.repo, commit)
    assert isinstance(placement, StorePlacement)
    for entry in entries:
        target = placement.final(entry)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            link_or_copy(os.path.join(directory, entry.path), str(target))
    placement.publish(entries, entries, _branch(ref))
    manifest = Manifest(
        ref.repo, "modelscope", settings.modelscope_endpoint, revision_of(ref.revision), selection_of(ref), commit,
        placement.directory, record(placement.directory, {e.path: e for e in entries}), "unverified",
    )  # fmt: skip
    write_manifest(manifest_path(settings.home, "modelscope", ref), manifest)
    return manifest.snapshot()


def link_or_copy(source: str, target: str) -> None:
    """Share the bytes where the volume can, copy them elsewhere."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target + ".copy")
        os.replace(target + ".copy", target)
