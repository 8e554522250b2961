"""Checks the safetensors files of a model directory before anything is read from them."""

import json
import struct
from pathlib import Path
from typing import Any

from metal_models.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# safetensors' names of the types that MLX reads.
_DTYPES = ("BF16", "F16", "F32", "F8_E4M3", "F8_E8M0", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")


def read_config(directory: Path) -> dict[str, Any]:
    """Return the model's ``config.json``.

    Raises:
        CheckpointError: It is missing or is not a JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"[load] expected a config.json in {directory}, got none. Give the directory of a downloaded model."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"[load] expected JSON in {path}, got {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"[load] expected an object in {path}, got a {type(config).__name__}.")
    return config


def check_files(directory: Path, *, torch_files: bool = False) -> None:
    """Check that every weight file is there and as long as its header says.

    Args:
        directory: The model's.
        torch_files: Whether PyTorch files will do where there are no others; of these only presence is checked.

    Raises:
        CheckpointError: Naming the first file that is missing or damaged.
    """
    files = sorted(directory.glob("model*.safetensors"))
    if torch_files and not files and any(directory.glob("pytorch_model*.bin")):
        return
    index = _index(directory)
    missing = sorted(set(index.values()) - {file.name for file in files})
    if missing:
        raise CheckpointError(
            f"[load] expected {missing[0]} in {directory}, which its index lists, got no such file"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}. Download it."
        )
    if not files:
        _refuse_pickles(directory)
        raise CheckpointError(
            f"[load] expected model*.safetensors or one .gguf file in {directory}, got neither. Download the weights."
        )
    _check_places({file.name: set(_tensors(file)) for file in files}, index, directory)


def _refuse_pickles(directory: Path) -> None:
    pickles = sorted(file.name for kind in ("bin", "pth", "pt") for file in directory.glob(f"*.{kind}"))
    if pickles:
        raise CheckpointError(
            f"[load] expected safetensors in {directory}, got {pickles[0]}, a pickle of PyTorch's, which can run code "
            "when it is read. Load it with transformers where you trust it and save_pretrained() the model: that "
            "writes safetensors."
        )


def _index(directory: Path) -> dict[str, str]:
    """Return the file of each tensor that the index lists, if there is an index."""
    path = directory / "model.safetensors.index.json"
    if not path.exists():
        return {}
    try:
        places = json.loads(path.read_text())["weight_map"]
        return {str(name): str(file) for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"[load] expected a weight_map in {path}, got a damaged file. Download it again."
        ) from error


def _check_places(files: dict[str, set[str]], index: dict[str, str], directory: Path) -> None:
    """Check that each tensor is in one file, and in the one that the index says."""
    places: dict[str, str] = {}
    for file, names in files.items():
        for name in names:
            if (other := places.setdefault(name, file)) != file:
                raise CheckpointError(
                    f"[load] expected one tensor {name} in {directory}, got one in {other} and one in {file}. Remove "
                    "the files that are no part of the model."
                )
    for name, file in index.items():
        if name not in files[file]:
            raise CheckpointError(
                f"[load] expected {name} in {directory / file}, where the index has it, got "
                f"{f'it in {places[name]}' if name in places else 'no such tensor'}. Download the files again."
            )


def _tensors(file: Path) -> list[str]:
    """Return the names of a file's tensors; the file is checked to be as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"[load] expected a safetensors header in {file}, got none in its {size} bytes. Download it again."
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
            kinds = {name: entry["dtype"] for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"[load] expected a safetensors header in {file}, got a damaged one. Download it again."
            ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"[load] expected {expected} bytes in {file}, got {size}: the file is "
            f"{'truncated' if size < expected else 'too long'}. Download it again."
        )
    for name, kind in kinds.items():
        if kind not in _DTYPES:
            raise CheckpointError(
                f"[load] expected tensors of {', '.join(_DTYPES)} in {file}, got {kind} for {name}. "
                "Use another version of the model."
            )
    return list(kinds)
