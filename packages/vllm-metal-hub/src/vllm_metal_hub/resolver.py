"""From what the user typed to one local path, once per launch, shared by every process of it."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from vllm_metal_hub import adoption, manifest
from vllm_metal_hub.aliases import Aliases, read_aliases
from vllm_metal_hub.errors import HubError, NetworkError, NotFoundError, OfflineError
from vllm_metal_hub.events import OnEvent, silent
from vllm_metal_hub.fetch_request import Request
from vllm_metal_hub.lock import locked
from vllm_metal_hub.manifest import Manifest, manifest_path, read_manifest, refreshed, revision_of
from vllm_metal_hub.model_ref import ModelRef, Source, parse
from vllm_metal_hub.settings import HubSettings, Update
from vllm_metal_hub.snapshot import LocalSnapshot, SnapshotSource

T = TypeVar("T")
Profile = Literal["auto", "small"]

RESOLVED = "VLLM_METAL_HUB_RESOLVED"
CHECK_S = 3.0  # how long `update="check"` waits for a hub before it keeps the pinned copy
START_S = 5.0  # and for the process that asks it to start
Answer = dict[str, Any]
_BOTH: tuple[Source, ...] = ("huggingface", "modelscope")


def resolve(
    ref: str,
    *,
    revision: str | None = None,
    sources: Sequence[Source] | None = None,
    offline: bool | None = None,
    update: Update | None = None,
    profile: Profile = "auto",
    on_event: OnEvent = silent,
    settings: HubSettings | None = None,
) -> LocalSnapshot:
    """Return the local snapshot that ``ref`` means, and let child processes inherit the answer.

    The order is: a local path; what a parent process resolved; what was pulled before; existing caches of Hugging
    Face and ModelScope, once verified; the hubs, in the order of ``sources``. A branch stays at what was pulled
    first until ``update`` is "check" or "always". ``profile`` "auto" is what a loader of the model reads; "small"
    leaves out the weights, for a tokenizer, a configuration or code. Every argument that is None is the environment's.

    Raises:
        HubError: one of its kinds says why there is no snapshot.
    """
    parsed = parse(ref, revision)
    if parsed.path is not None:
        return _local(parsed)
    base = settings or HubSettings.from_env()
    settings = replace(
        _with_sources(base, parsed, sources), offline=base.offline if offline is None else offline,
        update=update or base.update,
    )  # fmt: skip
    inherited = _inherited(parsed) if update is None else None
    if inherited is not None:
        return inherited
    if profile == "small":
        whole, _ = _Resolution(parsed, settings, on_event).pulled_before()
        if whole is not None:
            return whole
        parsed = replace(parsed, small=True)
    snapshot = _Resolution(parsed, settings, on_event).run()
    hand_down(parsed, snapshot)
    return snapshot


def list_files(ref: str, *, revision: str | None = None, on_event: OnEvent = silent) -> Answer:
    """Ask the hubs, in order, what a pull would give: its "commit", "bytes" and number of "files".

    Raises:
        HubError: no hub answers, or none has it.
    """
    parsed = parse(ref, revision)
    settings = _with_sources(HubSettings.from_env(), parsed, None)
    return _Resolution(parsed, settings, on_event).listed()


def _with_sources(settings: HubSettings, ref: ModelRef, sources: Sequence[Source] | None) -> HubSettings:
    return replace(settings, sources=(ref.source,) if ref.source else tuple(sources or settings.sources))


def _local(ref: ModelRef) -> LocalSnapshot:
    assert ref.path is not None
    if not ref.path.exists():
        raise NotFoundError(f"[model] expected a file or directory at {ref.path}, got none. Check the path.")
    return LocalSnapshot(ref.path, str(ref.path), "local")


@dataclass
class _Resolution:
    """One reference on its way to a snapshot."""

    ref: ModelRef
    settings: HubSettings
    on_event: OnEvent

    @cached_property
    def _aliases(self) -> Aliases:
        return read_aliases(self.settings)

    def _at(self, source: Source) -> ModelRef:
        """The reference as ``source`` names it; one with a scheme is meant as it is written."""
        if self.ref.source is not None:
            return self.ref
        return replace(self.ref, repo=self._aliases.name_at(source, self.ref.repo))

    def run(self) -> LocalSnapshot:
        damaged = ""
        if self.settings.update == "never" or self.settings.offline:
            snapshot, damaged = self.pulled_before()
            if snapshot is not None:
                return snapshot
            if self._asks("huggingface"):
                snapshot = adoption.adopt_huggingface(self._at("huggingface"), self.settings)
            if snapshot is not None:
                return snapshot
        if self.settings.offline:
            return self._offline(damaged)
        return self._from_hubs()

    def _asks(self, source: Source) -> bool:
        return source in self.settings.sources or (self.settings.offline and self.ref.source is None)

    def _order(self) -> tuple[Source, ...]:
        """The user's order; offline, a copy from the other hub is better than none."""
        if self.settings.offline and self.ref.source is None:
            return (*self.settings.sources, *(s for s in _BOTH if s not in self.settings.sources))
        return self.settings.sources

    def _manifests(self, sources: Sequence[Source]) -> Iterator[tuple[Path, Manifest]]:
        for source in sources:
            path = manifest_path(self.settings.home, source, self._at(source))
            found = read_manifest(path)
            if found is not None:
                yield path, found

    def pulled_before(self) -> tuple[LocalSnapshot | None, str]:
        """The snapshot of an earlier pull that is still as it was, or what is wrong with it."""
        damaged = ""
        for path, found in self._manifests(self._order()):
            wrong = manifest.problems(found)
            if not wrong:
                refreshed(path, found)
                return found.snapshot(check="stat" if found.check == "hash" else found.check), ""
            damaged = "; ".join(f"{name}: {what}" for name, what in list(wrong.items())[:3])
        return None, damaged

    def _offline(self, damaged: str) -> LocalSnapshot:
        seen = [f"the copy pulled before is damaged ({damaged})"] if damaged else []
        for source in self._order():
            try:
                return adoption.adopt_unverified(source, self._at(source), self.settings)
            except HubError as error:
                seen.append(str(error))
        raise OfflineError(
            f"[model] expected {self.ref.label}@{revision_of(self.ref.revision)} on this machine, since the network "
            f"may not be used, got: {'; '.join(seen)}. "
            f"Where there is a network, run: vllm-metal pull {self.ref.text}"
        )

    def _from_hubs(self) -> LocalSnapshot:
        found, failures = self._first(self._from_hub)
        if found is not None:
            return found
        fallback = self._without_hubs() if all(isinstance(f, NetworkError) for f in failures) else None
        if fallback is None:
            raise _together(failures)
        self.on_event({"event": "note", "text": f"{failures[-1]} Using the copy pulled before."})
        return fallback

    def _first(self, ask: Callable[[Source], T]) -> tuple[T | None, list[HubError]]:
        """Ask one hub after the other; go on when one does not answer or does not have it, and only then."""
        failures: list[HubError] = []
        for source in self.settings.sources:
            try:
                return ask(source), failures
            except (NetworkError, NotFoundError) as error:
                failures.append(error)
                if source != self.settings.sources[-1]:
                    self.on_event({"event": "note", "text": f"{source}: {error}"})
        return None, failures

    def _without_hubs(self) -> LocalSnapshot | None:
        """What there is when no hub answers and the user did not insist on an update."""
        if self.settings.update == "always":
            return None
        pinned, _ = self.pulled_before()
        if pinned is not None:
            return pinned
        for source in self.settings.sources:
            with contextlib.suppress(HubError):
                return adoption.adopt_unverified(source, self._at(source), self.settings)
        return None

    def _from_hub(self, source: Source) -> LocalSnapshot:
        path = manifest_path(self.settings.home, source, self._at(source))
        lock = self.settings.home / "locks" / source / (path.stem + ".lock")
        with self._locked(lock):
            before = read_manifest(path)
            if before is not None and not manifest.problems(before):
                if self.settings.update == "never":  # another process pulled it while this one waited
                    return before.snapshot(check="stat")
                if self._is_current(source, before):
                    return before.snapshot(check="stat")
            result = self._ask(self._request(source))
            found = read_manifest(Path(result["manifest"]))
            assert found is not None
            return found.snapshot(fetched_bytes=int(result["fetched"]))

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path, lambda text: self.on_event({"event": "note", "text": text})))
            except OSError as error:
                raise HubError(f"[pull] expected readable and writable caches, got {error}. Check them.") from error
            yield

    def _ask(self, request: Request, settings: HubSettings | None = None, limit_s: float | None = None) -> Answer:
        from vllm_metal_hub.fetch_process import run_fetch  # a warm start does without

        return run_fetch(request, settings or self.settings, self.on_event, limit_s=limit_s)

    def _is_current(self, source: Source, before: Manifest) -> bool:
        """Ask the hub what the branch is now; with "check", briefly."""
        settings, limit_s = self.settings, None
        if settings.update == "check":
            settings, limit_s = replace(settings, timeout_s=CHECK_S, retries=1), CHECK_S + START_S
        request = replace(
            self._request(source), only_list=True, known_commit=before.commit, adopt=(str(before.directory),)
        )
        return bool(self._ask(request, settings, limit_s)["commit"] == before.commit)

    def listed(self) -> Answer:
        """What the first hub that has it has now."""
        found, failures = self._first(lambda source: self._ask(replace(self._request(source), only_list=True)))
        if found is None:
            raise _together(failures)
        return found

    def _request(self, source: Source) -> Request:
        ref, other = self._at(source), [s for s in _BOTH if s != source]
        weights = next((m.weight_digests() for _, m in self._manifests(other)), frozenset())
        return Request(
            ref.label, source, ref.revision, small=ref.small,
            same_weights=() if ref.source or ref.small else tuple(sorted(weights)),
            adopt=adoption.candidates(source, ref, self.settings),
        )  # fmt: skip


def _together(failures: Sequence[HubError]) -> HubError:
    """One error for what every hub said."""
    if len(failures) == 1:
        return failures[0]
    kind = NotFoundError if all(isinstance(f, NotFoundError) for f in failures) else NetworkError
    return kind(" | ".join(str(failure) for failure in failures))


def _key(ref: ModelRef) -> str:
    scheme = {None: "", "huggingface": "hf://", "modelscope": "ms://"}[ref.source]
    return f"{scheme}{ref.label}@{revision_of(ref.revision)}{'#small' if ref.small else ''}"


def _table() -> dict[str, dict[str, str]]:
    with contextlib.suppress(ValueError):
        table = json.loads(os.environ.get(RESOLVED) or "{}")
        if isinstance(table, dict):
            return table
    return {}


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
