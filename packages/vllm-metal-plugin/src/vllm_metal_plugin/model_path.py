"""One resolution per launch: from what the user typed to one local path."""

import os
from collections.abc import Callable
from pathlib import Path

from vllm_metal_plugin.errors import ModelFilesError

Resolver = Callable[[str, str | None], str | None]

_resolvers: list[Resolver] = []


def register_resolver(resolver: Resolver) -> None:
    """Ask ``resolver(reference, revision)`` for references that are no local path.

    It returns a local path, or None to leave the reference to the next resolver. The last one registered is
    asked first; registering one twice has no effect.
    """
    if resolver not in _resolvers:
        _resolvers.append(resolver)


def resolve(reference: str, revision: str | None = None) -> str:
    """Return the local directory that ``reference`` stands for.

    A ``.gguf`` file, or a directory with nothing but one, becomes a directory with the configuration and
    tokenizer
    that the file carries, written once under the user's cache directory. A local directory is returned
    unchanged.

    Raises:
        ModelFilesError: No resolver knows the reference, or the path does not exist.
    """
    path = Path(reference).expanduser()
    if not path.exists():
        path = _from_resolvers(reference, revision)
    gguf = _gguf_in(path)
    return str(_sidecar(gguf)) if gguf is not None else str(path)


def _from_resolvers(reference: str, revision: str | None) -> Path:
    looks_local = reference.startswith(("/", "./", "../", "~")) or reference.endswith(".gguf")
    for resolver in () if looks_local else reversed(_resolvers):
        found = resolver(reference, revision)
        if found is not None:
            return Path(found)
    if looks_local or reference.count("/") != 1:
        raise ModelFilesError(
            f"[model] expected a model directory or a .gguf file, got {reference}, which does not exist. "
            "Check the path."
        )
    raise ModelFilesError(
        f"[model] expected a local model, got the hub id {reference}. "
        "Install vllm-metal-hub, which downloads models, or pass a local directory."
    )


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file to serve from ``path``, None for a directory that is complete as it is."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelFilesError(
                f"[model] expected a model directory or a .gguf file, got the file {path}. Pass its directory."
            )
        return path
    if (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelFilesError(f"[model] expected one .gguf file in {path}, got {names}. Pass the path of one of them.")
    return files[0] if files else None


def _sidecar(gguf: Path) -> Path:
    """The directory written for ``gguf``, below the user's cache directory."""
    from metal_models import MetalModelsError
    from metal_models.gguf import write_sidecar

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return write_sidecar(gguf, cache / "vllm-metal" / "gguf")
    except (OSError, MetalModelsError) as error:
        raise ModelFilesError(str(error)) from error
