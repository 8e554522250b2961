from pathlib import Path

import pytest

from vllm_metal_plugin.errors import ModelFilesError
from vllm_metal_plugin.model_path import register_resolver, resolve


def test_directory_stays_as_typed(model_dir: Path) -> None:
    assert resolve(str(model_dir)) == str(model_dir)


def test_missing_path_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="does not exist"):
        resolve(str(tmp_path / "nothing"))


def test_other_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x")
    with pytest.raises(ModelFilesError, match=r"weights\.bin"):
        resolve(str(file))


def test_several_ggufs_are_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelFilesError, match=r"a\.gguf, b\.gguf"):
        resolve(str(tmp_path))


def test_damaged_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(ModelFilesError, match=r"model\.gguf"):
        resolve(str(file))


def test_resolvers_are_asked_last_first_and_once(model_dir: Path) -> None:
    asked = []

    def first(reference: str, revision: str | None) -> str | None:
        asked.append(("first", reference, revision))
        return str(model_dir) if reference.startswith("org-of-test/") else None

    def second(reference: str, revision: str | None) -> str | None:
        asked.append(("second", reference, revision))
        return None

    for resolver in (first, second, first):
        register_resolver(resolver)
    assert resolve("org-of-test/model", "v1") == str(model_dir)
    mine = [entry for entry in asked if entry[1] == "org-of-test/model"]
    assert mine == [("second", "org-of-test/model", "v1"), ("first", "org-of-test/model", "v1")]
