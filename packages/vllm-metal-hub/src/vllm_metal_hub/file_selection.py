"""Which files of a repository a loader needs, and which it must never see."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from vllm_metal_hub.errors import NotFoundError, UsageError
from vllm_metal_hub.model_ref import ModelRef
from vllm_metal_hub.snapshot import FileEntry

INDEX = "model.safetensors.index.json"

_WEIGHT = re.compile(r"\.(safetensors|bin|pth|pt|h5|msgpack|onnx|onnx_data|npz|gguf|ckpt|mlmodel|tflite|ot|pdparams)$")
_SMALL = re.compile(
    r"\.(json|jinja|txt|model|tiktoken|py|yaml|yml|jsonl|spm|vocab|merges|md)$|^(LICENSE|NOTICE)[^/]*$"
)
# Folders of other formats of the same weights.
_OTHER_FORMATS = re.compile(r"^(original|onnx|openvino|coreml|tf|flax|metal|gguf|runs|checkpoint-\d+)/")
# Layers on top of embedding models, in files of their own: BGE-M3's, and projections of sentence-transformers.
_HEAD = re.compile(r"^((sparse|colbert)_linear\.pt|(?P<folder>\d+_Dense)/(model\.safetensors|pytorch_model\.bin))$")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.(?P<ext>safetensors|gguf)$")


def is_weight(path: str) -> bool:
    """Tell whether a file holds tensors, by its name."""
    return _WEIGHT.search(path) is not None


def check_names(entries: Iterable[FileEntry]) -> None:
    """Refuse listings that would write outside their directory, or twice to one file on a Mac's volume.

    Raises:
        UsageError: an absolute path, a ``..``, or two names that differ only in case.
    """
    seen: dict[str, str] = {}
    for entry in entries:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.path or "\0" in entry.path or not path.parts:
            raise UsageError(f"[pull] expected relative file names, got {entry.path!r}. Do not use this repository.")
        other = seen.setdefault(entry.path.casefold(), entry.path)
        if other != entry.path:
            raise UsageError(f"[pull] expected names that differ in more than case, got {other!r} and {entry.path!r}.")


def select(ref: ModelRef, entries: Iterable[FileEntry], index_text: str | None = None) -> tuple[FileEntry, ...]:
    """Choose what a loader of ``ref`` reads: small files, and one format of the weights.

    ``index_text`` is the content of ``model.safetensors.index.json`` where the repository has one; its
    shards are then taken exactly, whatever else lies beside them.

    Raises:
        NotFoundError: the quantisation, file or any weights are not in the listing.
        UsageError: unsafe names, or more than one GGUF file and none named.
    """
    listing = tuple(entries)
    check_names(listing)
    if ref.small:
        weights: list[FileEntry] = []
    elif selection_is_gguf(ref):
        weights = _gguf_files(ref, listing)
    else:
        weights = _weights(ref, listing, index_text) + _heads(listing)
    small = [e for e in listing if _is_small(e.path)]
    return tuple(sorted({e.path: e for e in [*small, *weights]}.values(), key=lambda e: e.path))


def _is_small(path: str) -> bool:
    if is_weight(path) or _OTHER_FORMATS.match(path) or path.startswith("."):
        return False
    return _SMALL.search(path) is not None


def _weights(ref: ModelRef, listing: tuple[FileEntry, ...], index_text: str | None) -> list[FileEntry]:
    by_path = {e.path: e for e in listing}
    if index_text is not None and INDEX in by_path:
        names = shards_of_index(index_text)
        missing = sorted(names - by_path.keys())
        if missing:
            raise NotFoundError(
                f"[pull] expected every shard of {INDEX} in {ref.repo}, not {', '.join(missing[:3])}. "
                "Its owner has to upload them."
            )
        return [by_path[name] for name in sorted(names)]
    plain = [e for e in listing if "/" not in e.path and e.path.endswith(".safetensors")]
    models = [e for e in plain if e.path.startswith(("model", "pytorch_model"))]
    adapters = [e for e in plain if e.path.startswith("adapter_model")]
    if models or adapters or plain:
        return models or adapters or plain
    ggufs = [e for e in listing if e.path.endswith(".gguf") and "mmproj" not in e.path.lower()]
    if ggufs:
        return _one_gguf(ref, ggufs)
    fallback = [
        e for e in listing if e.path.endswith((".npz", ".bin")) and "/" not in e.path and "training" not in e.path
    ]
    if not fallback:
        raise NotFoundError(
            f"[pull] expected safetensors or GGUF weights in {ref.repo}, got {len(listing)} other files. "
            "Choose a repository that has them."
        )
    return fallback


def _heads(listing: tuple[FileEntry, ...]) -> list[FileEntry]:
    """Files of layers on top; of two formats of one layer the first by name, safetensors."""
    heads: dict[str, FileEntry] = {}
    for entry in sorted(listing, key=lambda e: e.path):
        if match := _HEAD.match(entry.path):
            heads.setdefault(match["folder"] or entry.path, entry)
    return list(heads.values())


def shards_of_index(index_text: str) -> set[str]:
    """The weight files that a safetensors index names."""
    try:
        weight_map: Mapping[str, str] = json.loads(index_text)["weight_map"]
        return set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"[pull] expected a weight_map in {INDEX}, got {error!r}. The repository is broken."
        ) from error


def _one_gguf(ref: ModelRef, ggufs: list[FileEntry]) -> list[FileEntry]:
    groups = _shard_groups(ggufs)
    if len(groups) == 1:
        return next(iter(groups.values()))
    names = ", ".join(sorted(groups))
    raise UsageError(
        f"[model] expected one GGUF file in {ref.repo}, got {names}. Write {ref.repo}:QUANT, e.g. :Q4_K_M."
    )


def _shard_groups(ggufs: Iterable[FileEntry]) -> dict[str, list[FileEntry]]:
    groups: dict[str, list[FileEntry]] = {}
    for entry in ggufs:
        match = _SHARD.match(entry.path)
        groups.setdefault(match["stem"] if match else entry.path.removesuffix(".gguf"), []).append(entry)
    return groups


def _gguf_files(ref: ModelRef, listing: tuple[FileEntry, ...]) -> list[FileEntry]:
    ggufs = [e for e in listing if e.path.endswith(".gguf")]
    if ref.file:
        found = [e for e in ggufs if e.path == ref.file]
    else:
        tag = re.compile(rf"(^|[-._/]){re.escape(ref.quant or '')}([-.]|$)", re.IGNORECASE)
        groups = _shard_groups(e for e in ggufs if "mmproj" not in e.path.lower())
        matches = [entries for stem, entries in groups.items() if tag.search(stem)]
        if len(matches) > 1:
            names = ", ".join(entries[0].path for entries in matches)
            raise UsageError(
                f"[model] expected one file for :{ref.quant}, got {names}. Name it: {ref.repo}/FILE.gguf."
            )
        found = matches[0] if matches else []
    if not found:
        offered = ", ".join(sorted(_shard_groups(ggufs)))
        remedy = "Choose one of them." if offered else "Drop it, or choose a repository with GGUF files."
        raise NotFoundError(
            f"[pull] expected {ref.file or ref.quant} in {ref.repo}, got {offered or 'no GGUF file at all'}. {remedy}"
        )
    return found


def selection_is_gguf(ref: ModelRef) -> bool:
    """Tell whether a reference names a GGUF file, whatever else the repository holds."""
    return bool(ref.quant or ref.file)


def needs_config(ref: ModelRef, files: Iterable[FileEntry]) -> bool:
    """Tell whether a loader of these files wants a config.json: a GGUF file carries its own, an adapter has none."""
    return not ref.small and not any(
        entry.path.endswith(".gguf") or entry.path.startswith("adapter_model") for entry in files
    )
