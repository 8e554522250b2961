"""The snapshots on this machine: listing, verifying and removing them."""

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_metal_hub import manifest
from vllm_metal_hub.aliases import Aliases, read_aliases
from vllm_metal_hub.errors import NotFoundError
from vllm_metal_hub.manifest import SMALL, Manifest, manifests, problems, refreshed, revision_of, selection_of
from vllm_metal_hub.model_ref import ModelRef, Source, parse
from vllm_metal_hub.remote_code import copies_of
from vllm_metal_hub.settings import HubSettings


@dataclass(frozen=True)
class Installed:
    """One snapshot that a manifest makes usable."""

    manifest_path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """As users write it."""
        found = self.manifest
        label = f"{found.repo}{'/' if found.selection.endswith('.gguf') else ':'}{found.selection}".rstrip(":/")
        return label + ("" if found.revision == "main" else f"@{found.revision}")

    @property
    def nbytes(self) -> int:
        """Size of its files."""
        return sum(recorded.entry.size for recorded in self.manifest.files)


def installed(settings: HubSettings | None = None) -> list[Installed]:
    """Every snapshot that was pulled, adopted or imported; one without weights only where there is no whole one."""
    found = _all(settings or HubSettings.from_env())
    whole = {_branch(item.manifest) for item in found if not item.manifest.selection}
    return [item for item in found if item.manifest.selection != SMALL or _branch(item.manifest) not in whole]


def _all(settings: HubSettings) -> list[Installed]:
    return [Installed(path, found) for path, found in manifests(settings.home)]


def _branch(found: Manifest) -> tuple[str, str, str]:
    return (found.source, found.repo, found.revision)


def find(
    text: str, revision: str | None = None, settings: HubSettings | None = None, *, also_small: bool = False
) -> list[Installed]:
    """The installed snapshots that a reference means: one per hub.

    Args:
        text: What the user typed.
        revision: And the revision beside it.
        settings: The environment's, when None.
        also_small: Whether a model of which only the small files are here will do.

    Raises:
        NotFoundError: none is installed.
    """
    ref, settings = parse(text, revision), settings or HubSettings.from_env()
    aliases = read_aliases(settings)
    refs = (ref, replace(ref, small=True)) if also_small and not selection_of(ref) else (ref,)
    found = [item for item in installed(settings) if any(_means(one, item.manifest, aliases) for one in refs)]
    if not found:
        raise NotFoundError(f"[model] expected {text} among the pulled models, got none. See: vllm-metal list")
    return found


def _means(ref: ModelRef, found: Manifest, aliases: Aliases) -> bool:
    source: Source = "modelscope" if found.source == "modelscope" else "huggingface"
    return (
        found.repo in (ref.repo, aliases.name_at(source, ref.repo) if ref.source is None else ref.repo)
        and found.selection == selection_of(ref)
        and found.revision == revision_of(ref.revision)
        and ref.source in (None, found.source)
    )


def verify(item: Installed, *, full: bool = True) -> dict[str, str]:
    """What is wrong with a snapshot, by file; ``full`` hashes every byte."""
    wrong = problems(item.manifest, full=full)
    if not wrong:
        refreshed(item.manifest_path, item.manifest)
    return wrong


def remove(item: Installed, settings: HubSettings | None = None) -> int:
    """Remove a snapshot, and its bytes where no other snapshot uses them; return how many were freed."""
    settings = settings or HubSettings.from_env()
    for other in _all(settings):
        if other.manifest.selection == SMALL and _branch(other.manifest) == _branch(item.manifest):
            other.manifest_path.unlink(missing_ok=True)
    item.manifest_path.unlink(missing_ok=True)
    others = {found.directory for _, found in manifest.manifests(settings.home)}
    directory = item.manifest.directory
    if directory in others or not directory.is_dir():
        return 0
    for copy in copies_of(directory, settings.with_code):
        shutil.rmtree(copy)
    if directory.is_relative_to(settings.home):
        freed = _size(directory)
        shutil.rmtree(directory)
        return freed
    return _remove_from_huggingface(directory)


def _remove_from_huggingface(directory: Path) -> int:
    """Remove one snapshot of a Hugging Face cache, the references to it, and the blobs that only it used."""
    folder = directory.parent.parent
    blobs = {path.resolve() for path in directory.rglob("*") if path.is_symlink()}
    shutil.rmtree(directory)
    for reference in (folder / "refs").rglob("*"):
        if reference.is_file() and reference.read_text().strip() == directory.name:
            reference.unlink()
    (folder / "trees" / f"{directory.name}.json").unlink(missing_ok=True)
    used = {path.resolve() for path in (folder / "snapshots").rglob("*") if path.is_symlink()}
    freed = 0
    for blob in blobs - used:
        with contextlib.suppress(OSError):
            freed += blob.stat().st_size
            blob.unlink()
    if not any((folder / "snapshots").iterdir()):
        shutil.rmtree(folder)
    return freed


def _size(directory: Path) -> int:
    return sum(os.lstat(path).st_size for path in directory.rglob("*") if path.is_file())
