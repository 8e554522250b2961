"""A model directory beside a GGUF file, for front ends that want config.json and tokenizer.json."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from metal_models.gguf.config import config_of, open_gguf, token_ids
from metal_models.gguf.file import GGUFFile
from metal_models.gguf.tokenizer import write_tokenizer

# Counted up when what is written changes, so that directories of older versions are not taken.
_LAYOUT = 1
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def write_sidecar(gguf_path: str | Path, out_dir: str | Path) -> Path:
    """Write (once) and return a model directory for a GGUF file.

    It holds config.json, generation_config.json, the tokenizer with its chat template, and a link to the
    file. Its name contains a hash of the file's path, size and modification time: a changed file gets a
    new directory, an unchanged one gets what is there. It appears complete or not at all.

    Args:
        gguf_path: A .gguf file, or a directory with one.
        out_dir: Directory to put it in; made if missing.

    Raises:
        MetalModelsError: The file is damaged, or its architecture or tokenizer is not supported.
    """
    file = open_gguf(Path(gguf_path).absolute())
    out_dir = Path(out_dir)
    sidecar = out_dir / f"{file.path.stem}-{_key(file.path)}"
    if sidecar.is_dir():
        return sidecar
    out_dir.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{sidecar.name}-", dir=out_dir))
    try:
        _fill(draft, file)
        draft.chmod(0o755)
        draft.rename(sidecar)
    except OSError:
        if not sidecar.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sidecar


def _key(path: Path) -> str:
    status = path.stat()
    return hashlib.sha256(f"{_LAYOUT}\n{path}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:12]


def _fill(directory: Path, file: GGUFFile) -> None:
    write_tokenizer(file, directory)
    # The marker tells a config made here from the model's own.
    _write(directory / "config.json", {**config_of(file), "metal_gguf": file.path.name})
    sampling = {
        name: file.metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in file.metadata
    }
    _write(directory / "generation_config.json", {**token_ids(file), **sampling})
    (directory / file.path.name).symlink_to(file.path)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
