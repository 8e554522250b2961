"""The vllm-metal command line, and one local snapshot per launch."""

from typing import TYPE_CHECKING, Any

from vllm_metal_hub.snapshot import LocalSnapshot

if TYPE_CHECKING:
    from vllm_metal_hub.planning import Plan
    from vllm_metal_hub.resolver import Profile
    from vllm_metal_hub.settings import Update
    from vllm_metal_hub.store import Installed

__all__ = ["LocalSnapshot", "installed", "plan", "register_general", "remove", "resolve", "verify"]


def resolve(
    ref: str,
    *,
    revision: str | None = None,
    source: str | None = None,
    profile: "Profile" = "auto",
    offline: bool | None = None,
    update: "Update | None" = None,
) -> LocalSnapshot:
    """Return the one local, complete snapshot that ``ref`` means; see ``vllm_metal_hub.resolver.resolve``.

    ``source`` is ``huggingface``, ``modelscope``, or both with a comma: the order they are asked in.
    """
    from vllm_metal_hub.resolver import resolve as resolve_once
    from vllm_metal_hub.settings import parse_sources

    return resolve_once(
        ref, revision=revision, sources=parse_sources(source) if source else None, profile=profile, offline=offline,
        update=update,
    )  # fmt: skip


def plan(ref: str, *, revision: str | None = None) -> "Plan":
    """Return what a model would take of this machine: bytes to fetch, memory, cache, context; writes no weights."""
    from vllm_metal_hub.planning import make_plan

    return make_plan(ref, revision)


def verify(ref: str, *, revision: str | None = None, full: bool = True) -> dict[str, str]:
    """Return what differs from what was pulled, by file; ``full`` hashes every byte."""
    from vllm_metal_hub import store

    return {name: what for item in store.find(ref, revision) for name, what in store.verify(item, full=full).items()}


def installed() -> "list[Installed]":
    """Return every snapshot that was pulled, adopted or imported."""
    from vllm_metal_hub import store

    return store.installed()


def remove(ref: str, *, revision: str | None = None) -> int:
    """Remove the snapshots that ``ref`` means; return how many bytes that freed."""
    from vllm_metal_hub import store

    return sum(store.remove(item) for item in store.find(ref, revision))


def register_general() -> None:
    """Entry point of vLLM's general plugins: model ids become local paths before the engine is configured."""
    from vllm_metal_hub.vllm_plugin import register

    register()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vllm-metal-hub")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
