"""Damaged model directories are named before anything is read from them."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import pytest

from metal_models import CheckpointError
from metal_models.checkpoint import check_files, read_config


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.ones((4, 4)), "b": mx.ones((2,))})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_a_whole_directory_passes(directory: Path) -> None:
    check_files(directory)
    assert read_config(directory) == {"model_type": "llama"}


@pytest.mark.parametrize("removed", [1, 40])
def test_truncated_file(directory: Path, removed: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-removed])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        check_files(directory)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 1 << 60) + b"x" * 64, b"<!DOCTYPE html>" * 9])
def test_not_a_safetensors_file(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"header in .*model\.safetensors"):
        check_files(directory)


def test_damaged_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"{'a': 1}")
    with pytest.raises(CheckpointError, match="damaged"):
        check_files(directory)


def test_shard_that_the_index_lists_is_missing(directory: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "c": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        check_files(directory)


def shards(directory: Path, weight_map: dict[str, str]) -> Path:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    mx.save_safetensors(str(directory / "model-00002-of-00002.safetensors"), {"c": mx.ones((4,))})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_as_the_index_has_them(directory: Path) -> None:
    check_files(shards(directory, {"a": FIRST, "b": FIRST, "c": SECOND}))


def test_tensor_in_another_shard_than_the_index_has_it(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=f"expected b in .*{SECOND}.*got it in {FIRST}"):
        check_files(shards(directory, {"a": FIRST, "b": SECOND, "c": SECOND}))


def test_tensor_that_only_the_index_has(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=f"expected d in .*{SECOND}.*got no such tensor"):
        check_files(shards(directory, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}))


def test_tensor_in_two_files(directory: Path) -> None:
    mx.save_safetensors(str(directory / "model-00001-of-00001.safetensors"), {"a": mx.ones((4, 4))})
    with pytest.raises(CheckpointError, match=r"one tensor a in .*Remove the files"):
        check_files(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=rf"got {name}, a pickle .*save_pretrained"):
        check_files(tmp_path)


def test_type_that_mlx_does_not_read(directory: Path) -> None:
    header = json.dumps({"w": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="got F8_E5M2 for w"):
        check_files(directory)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"or one \.gguf"):
        check_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "got none"), ("{", "expected JSON"), ("[]", "expected an object")]
)
def test_bad_config(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)
