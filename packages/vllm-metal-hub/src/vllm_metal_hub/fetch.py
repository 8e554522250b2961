"""The one process that talks to hubs: a request on stdin, events on stdout, one JSON object a line.

It is a process of its own because the hubs' libraries read their environment when they are imported and patch
what they find, and because it can be ended at any time: nothing it leaves behind counts until a manifest says so.
"""

import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_metal_hub import file_selection
from vllm_metal_hub.adoption import link_or_copy
from vllm_metal_hub.checksum import digest_of
from vllm_metal_hub.errors import DiskFullError, HubError, IntegrityError
from vllm_metal_hub.events import EventWriter
from vllm_metal_hub.fetch_request import Request, read_request
from vllm_metal_hub.manifest import Manifest, manifest_path, record, revision_of, selection_of, write_manifest
from vllm_metal_hub.model_ref import ModelRef, Source, parse
from vllm_metal_hub.placement import Placement, place, tree_commit
from vllm_metal_hub.ranged_download import Retries, download
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.sizes import bytes_text
from vllm_metal_hub.snapshot import FileEntry
from vllm_metal_hub.sources import Hub, Listing, open_hub

PARALLEL_FILES = 4
_SPARE = 1.02  # room that a pull leaves: file systems need a little more than the bytes


def main() -> None:
    """Serve one request; a parent that goes away takes this process with it."""
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries print where they like
    events = EventWriter(answers)
    try:
        request = read_request(sys.stdin.readline())
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        events.result(fetch(request, HubSettings.from_env(), events))
    except HubError as error:
        events.error(type(error).__name__, str(error))
    except OSError as error:
        events.error("HubError", f"[pull] expected readable and writable caches, got {error}. Check them.")
    os._exit(0)  # worker threads may still hang on a dead connection


def _exit_with_parent() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(1)


def fetch(request: Request, settings: HubSettings, events: EventWriter) -> dict[str, Any]:
    """List, select, download, verify, publish; return the manifest's path and what was fetched."""
    ref = replace(parse(request.ref, request.revision), small=request.small)
    retries = Retries(settings.retries, events.note)
    hub = open_hub(request.source, settings)
    asked = _asked_revision(request.source, ref)
    if request.known_commit and retries.run(ref.repo, lambda: hub.commit(ref.repo, asked)) == request.known_commit:
        return {"commit": request.known_commit}
    listing = retries.run(f"the file list of {ref.repo}", lambda: hub.list_files(ref.repo, asked))
    pull = _Pull(request, ref, hub, settings, retries, events, listing)
    entries = pull.select()
    commit = _commit(request.source, listing, entries)
    if request.only_list:
        return {"commit": commit, "bytes": sum(e.size for e in entries), "files": len(entries)}
    return pull.run(entries, commit)


def _asked_revision(source: Source, ref: ModelRef) -> str | None:
    revision = revision_of(ref.revision)
    return None if revision == "main" and source == "modelscope" else revision


def _commit(source: Source, listing: Listing, entries: tuple[FileEntry, ...]) -> str:
    return listing.commit if source == "huggingface" else tree_commit(entries)


@dataclass
class _Pull:
    request: Request
    ref: ModelRef
    hub: Hub
    settings: HubSettings
    retries: Retries
    events: EventWriter
    listing: Listing

    def select(self) -> tuple[FileEntry, ...]:
        """The files that the loader needs; the safetensors index is read first where there is one."""
        index = next((e for e in self.listing.files if e.path == file_selection.INDEX), None)
        if index is None or self.ref.small or file_selection.selection_is_gguf(self.ref):
            return file_selection.select(self.ref, self.listing.files)
        return file_selection.select(self.ref, self.listing.files, self._index_text(index))

    def _index_text(self, index: FileEntry) -> str:
        for root in map(Path, self.request.adopt):
            if _is_copy(root / index.path, index):
                return (root / index.path).read_text()
        scratch = self.settings.home / "indexes" / (index.digest.split(":")[-1] or "index")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        download(index, scratch, lambda at: self._open(index, at), self.retries, lambda count: None)
        text = scratch.read_text()
        scratch.unlink()
        return text

    def run(self, entries: tuple[FileEntry, ...], commit: str) -> dict[str, Any]:
        self._check_namesake(entries)
        placement = place(self.request.source, self.settings, self.ref.repo, commit)
        wanted = {placement.final(entry): entry for entry in entries}  # equal files share one place
        missing = [entry for entry in wanted.values() if not self._have(placement, entry)]
        self._check_room(placement, missing)
        self.events.plan(entries, missing)
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            jobs = [pool.submit(self._file, placement, e) for e in sorted(missing, key=lambda e: -e.size)]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        placement.publish(entries, self.listing.files, revision_of(self.ref.revision))
        return self._write_manifest(placement, entries, commit, sum(e.size for e in missing))

    def _open(self, entry: FileEntry, at: int) -> Any:
        return self.hub.open(self.ref.repo, self.listing.commit, entry.path, at)

    def _check_namesake(self, entries: tuple[FileEntry, ...]) -> None:
        if not self.request.same_weights:
            return
        weights = {e.digest for e in entries if file_selection.is_weight(e.path)}
        if weights != set(self.request.same_weights):
            raise IntegrityError(
                f"[pull] expected {self.ref.repo} at {self.hub.endpoint} to have the weights that were pulled before "
                "from the other hub, got others: it may be another owner's model of the same name. Name the hub: "
                f"hf://{self.ref.repo} or ms://{self.ref.repo}."
            )

    def _have(self, placement: Placement, entry: FileEntry) -> bool:
        """Tell whether the right bytes are in place already; wrong ones are removed."""
        final = placement.final(entry)
        if final.exists():
            if final.stat().st_size == entry.size and (
                not entry.digest or digest_of(final, entry.digest) == entry.digest
            ):
                return True
            self.events.note(f"{entry.path}: the copy in the cache is damaged; fetching it again")
            final.unlink()
        return self._adopt(placement, entry)

    def _adopt(self, placement: Placement, entry: FileEntry) -> bool:
        for root in map(Path, self.request.adopt):
            candidate = root / entry.path
            if _is_copy(candidate, entry):
                final = placement.final(entry)
                final.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(str(candidate), str(final))
                return True
        return False

    def _check_room(self, placement: Placement, missing: list[FileEntry]) -> None:
        target = placement.directory
        while not target.exists():
            target = target.parent
        parts = (placement.part(entry) for entry in missing)
        present = sum(part.stat().st_size for part in parts if part.exists())
        need = int((sum(entry.size for entry in missing) - present) * _SPARE)
        free = shutil.disk_usage(target).free
        if need > free:
            raise DiskFullError(
                f"[pull] expected {bytes_text(need)} free at {target} for {self.ref.repo}, got {bytes_text(free)}. "
                "Free some space, or move the caches: HF_HOME, VLLM_METAL_HUB_HOME."
            )

    def _file(self, placement: Placement, entry: FileEntry) -> None:
        part, final = placement.part(entry), placement.final(entry)
        part.parent.mkdir(parents=True, exist_ok=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        self.events.start(entry)
        download(entry, part, lambda at: self._open(entry, at), self.retries, lambda n: self.events.bytes(entry, n))
        os.replace(part, final)
        self.events.done(entry)

    def _write_manifest(
        self, placement: Placement, entries: tuple[FileEntry, ...], commit: str, fetched: int
    ) -> dict[str, Any]:
        known = {e.path: _with_digest(placement.directory / e.path, e) for e in entries}
        manifest = Manifest(
            self.ref.repo, self.request.source, self.hub.endpoint, revision_of(self.ref.revision),
            selection_of(self.ref), commit, placement.directory, record(placement.directory, known),
        )  # fmt: skip
        path = manifest_path(self.settings.home, self.request.source, self.ref)
        write_manifest(path, manifest)
        return {"manifest": str(path), "fetched": fetched, "commit": commit}


def _is_copy(path: Path, entry: FileEntry) -> bool:
    """Tell whether the file is what the hub lists, by its digest."""
    return (
        bool(entry.digest)
        and path.is_file()
        and path.stat().st_size == entry.size
        and digest_of(path, entry.digest) == entry.digest
    )


def _with_digest(path: Path, entry: FileEntry) -> FileEntry:
    """Record a digest of our own where the hub publishes none."""
    return entry if entry.digest else replace(entry, digest=digest_of(path, ""))


if __name__ == "__main__":
    main()
