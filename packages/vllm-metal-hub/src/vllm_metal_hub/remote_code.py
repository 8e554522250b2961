"""Python code that a model takes from another repository, brought into one directory with the model.

A configuration may name ``owner/code--module.Class`` in its ``auto_map``. transformers would ask a hub for that
repository in every process, even when the model is a local directory. Here the code is resolved once, and the model
gets a directory in which the same names are local.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_metal_hub.errors import UsageError

CONFIGURATIONS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)

Resolve = Callable[[str], Path]


def code_repositories(directory: Path) -> tuple[str, ...]:
    """The other repositories whose code the configurations of a model name, sorted."""
    return tuple(sorted({repo for content in _configurations(directory).values() for repo in _named(content)}))


def with_code(directory: Path, resolve: Resolve, root: Path) -> Path:
    """Return ``directory`` itself, or one below ``root`` with the same files, the code, and local names for it.

    The files are links, so that weights are not copied; the same model and code give the same directory again.

    Raises:
        UsageError: the model and the code have different modules of one name.
    """
    repositories = code_repositories(directory)
    if not repositories:
        return directory
    code = {repo: resolve(repo) for repo in repositories}
    target = root / f"{_short(str(directory))}-{_short(json.dumps({r: str(p) for r, p in code.items()}))}"
    if target.is_dir() and all(path.exists() for path in target.rglob("*")):
        return target
    shutil.rmtree(target, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=".new-"))
    try:
        _fill(scratch, directory, code)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def copies_of(directory: Path, root: Path) -> list[Path]:
    """The directories that ``with_code`` made for a model."""
    return sorted(root.glob(f"{_short(str(directory))}-*"))


def _fill(scratch: Path, directory: Path, code: Mapping[str, Path]) -> None:
    rewritten = _configurations(directory)
    for path in _files(directory):
        name = path.relative_to(directory)
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        if str(name) in rewritten:
            (scratch / name).write_text(json.dumps(_localised(rewritten[str(name)]), indent=2))
        elif path.suffix == ".py":
            shutil.copyfile(path, scratch / name)
        else:
            (scratch / name).symlink_to(os.path.realpath(path))
    for repo, folder in code.items():
        for path in _files(folder):
            if path.suffix == ".py":
                _add_module(scratch / path.relative_to(folder), path, repo)


def _add_module(target: Path, path: Path, repo: str) -> None:
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise UsageError(
            f"[remote code] expected one module {target.name} for the model, got another of that name in {repo}. "
            "Copy the model and its code into one directory, with names of their own, and serve that."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _publish(scratch: Path, target: Path) -> None:
    scratch.chmod(0o755)
    try:
        os.replace(scratch, target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, with the same content
            raise


def _files(directory: Path) -> Iterator[Path]:
    yield from (path for path in sorted(directory.rglob("*")) if path.is_file())


def _configurations(directory: Path) -> dict[str, Any]:
    """The configurations of a model that name code elsewhere, by file name."""
    found = {}
    for name in CONFIGURATIONS:
        try:
            content = json.loads((directory / name).read_text())
        except (OSError, ValueError):
            continue
        if any(_named(content)):
            found[name] = content
    return found


def _named(content: Any) -> Iterator[str]:
    """The repositories in every ``auto_map`` of a configuration, however deep."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "auto_map" and isinstance(value, dict):
                yield from (word.split("--")[0] for word in _words(value) if "--" in word)
            else:
                yield from _named(value)


def _words(auto_map: Mapping[str, Any]) -> Iterator[str]:
    """Class references of an auto_map; a tokenizer has a list of two, either of which may be null."""
    for value in auto_map.values():
        yield from (word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str))


def _localised(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {
        key: {name: _local_name(value) for name, value in inner.items()}
        if key == "auto_map" and isinstance(inner, dict)
        else _localised(inner)
        for key, inner in content.items()
    }


def _local_name(value: Any) -> Any:
    if isinstance(value, list):
        return [_local_name(word) for word in value]
    return value.split("--")[-1] if isinstance(value, str) else value


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]
