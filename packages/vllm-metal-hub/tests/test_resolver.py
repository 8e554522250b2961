import json
import os
import subprocess
import sys

import pytest

from vllm_metal_hub.errors import NotFoundError, OfflineError
from vllm_metal_hub.resolver import resolve

FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
COMMIT = "c" * 40


def test_a_local_directory_is_itself(tmp_path):
    snapshot = resolve(str(tmp_path))
    assert (snapshot.path, snapshot.source) == (tmp_path, "local")


def test_a_local_path_that_is_not_there():
    with pytest.raises(NotFoundError, match="Check the path"):
        resolve("./nothing-here")


def test_a_complete_hugging_face_snapshot(hf_cache):
    path = hf_cache("owner/name", COMMIT, FILES)
    for revision in (None, "main", "master", COMMIT):
        snapshot = resolve("owner/name", revision=revision)
        assert (snapshot.path, snapshot.commit, snapshot.source) == (path, COMMIT, "huggingface")


def test_a_snapshot_without_a_kept_listing_is_used_when_no_hub_answers(hf_cache, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("VLLM_METAL_HUB_RETRIES", "1")
    path = hf_cache("owner/name", COMMIT, FILES, listing=False)
    hub.close()
    snapshot = resolve("owner/name")
    assert (snapshot.path, snapshot.check) == (path, "unverified")


def test_one_gguf_file_is_what_the_loader_gets(hf_cache):
    path = hf_cache("owner/name", COMMIT, {"a-Q4_0.gguf": b"4", "a-Q8_0.gguf": b"8"})
    assert resolve("owner/name:Q8_0").path == path / "a-Q8_0.gguf"


@pytest.mark.parametrize(
    ("listing", "absent", "said"),
    [
        (True, ("model.safetensors",), "model.safetensors is missing"),
        (True, ("tokenizer.json",), "tokenizer.json is missing"),
        (False, ("config.json",), "config.json is missing"),
        (False, ("model.safetensors",), "weights"),
    ],
)
def test_a_partial_snapshot_is_refused_with_what_is_missing(hf_cache, monkeypatch, listing, absent, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf_cache("owner/name", COMMIT, FILES, listing=listing, absent=absent)
    with pytest.raises(OfflineError, match=said):
        resolve("owner/name")


def test_a_truncated_weight_is_refused(hf_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = hf_cache("owner/name", COMMIT, FILES)
    (path / "model.safetensors").resolve().write_bytes(b"weig")
    with pytest.raises(OfflineError, match="4 bytes instead of 7"):
        resolve("owner/name")


def test_shards_named_by_the_index_must_all_be_there(hf_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": index,
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
    }
    hf_cache("owner/name", COMMIT, files, listing=False, absent=("model-2.safetensors",))
    with pytest.raises(OfflineError, match=r"model-2\.safetensors"):
        resolve("owner/name")


def test_children_inherit_the_answer_even_when_the_cache_setting_is_gone(hf_cache):
    path = hf_cache("owner/name", COMMIT, FILES)
    resolve("owner/name")
    env = {**os.environ, "HF_HUB_CACHE": "/nowhere"}
    program = "from vllm_metal_hub import resolve; print(resolve('owner/name').path)"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(path)
