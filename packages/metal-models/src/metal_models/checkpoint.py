"""Checks the safetensors files of a model directory before anything is read from them."""

import json
import struct
from pathlib import Path
from typing import Any

from metal_models.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


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


def check_files(directory: Path) -> None:
    """Check that every weight file is there and as long as its header says.

    Raises:
        CheckpointError: Naming the first file that is missing or damaged.
    """
    files = sorted(directory.glob("model*.safetensors"))
    missing = sorted(_indexed(directory) - {file.name for file in files})
    if missing:
        raise CheckpointError(
            f"[load] expected {missing[0]} in {directory}, which its index lists, got no such file"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}. Download it."
        )
    if not files:
        raise CheckpointError(
            f"[load] expected model*.safetensors or one .gguf file in {directory}, got neither. Download the weights."
        )
    for file in files:
        _check_length(file)


def _indexed(directory: Path) -> set[str]:
    """Return the names of the weight files that the index lists, if there is an index."""
    path = directory / "model.safetensors.index.json"
    if not path.exists():
        return set()
    try:
        return set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"[load] expected a weight_map in {path}, got a damaged file. Download it again."
        ) from error


def _check_length(file: Path) -> None:
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
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
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
