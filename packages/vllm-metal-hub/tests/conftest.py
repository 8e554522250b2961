import json

import pytest


@pytest.fixture(autouse=True)
def _own_world(tmp_path_factory, monkeypatch):
    """No test sees this machine's caches, tokens, mirrors or proxies."""
    home = tmp_path_factory.mktemp("home")
    for name in list(__import__("os").environ):
        if name.startswith(("HF_", "MODELSCOPE_", "VLLM_METAL", "VLLM_USE_MODELSCOPE", "TRANSFORMERS_OFFLINE")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NO_PROXY", "*")
    # resolve() writes this one; setting it here makes monkeypatch restore it.
    monkeypatch.setenv("VLLM_METAL_HUB_RESOLVED", "{}")
    return home


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """Builds snapshots in a Hugging Face cache the way the client lays them out."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def build(repo, commit, files, *, branch="main", listing=True, absent=()):
        folder = tmp_path / "hub" / ("models--" + repo.replace("/", "--"))
        snapshot = folder / "snapshots" / commit
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "trees").mkdir(exist_ok=True)
        if branch:
            (folder / "refs" / branch).write_text(commit)
        tree = {}
        for name, content in files.items():
            blob_id = git_sha1(content)
            tree[name] = {"size": len(content), "blob_id": blob_id}
            if name.endswith((".safetensors", ".gguf")):
                tree[name] |= {"lfs_sha256": sha256(content), "lfs_size": len(content)}
            if name in absent:
                continue
            blob = folder / "blobs" / blob_id
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(content)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(blob)
        if listing:
            (folder / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": tree}))
        return snapshot

    return build


def sha256(content):
    return __import__("hashlib").sha256(content).hexdigest()


def git_sha1(content):
    return __import__("hashlib").sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fault server that every client of this test and of its children talks to."""
    from vllm_metal_hub.testing import FaultServer

    with FaultServer() as server:
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def events():
    """Collects what a resolution says."""

    class Events(list):
        def __call__(self, event):
            self.append(event)

        @property
        def notes(self):
            return [event["text"] for event in self if event["event"] == "note"]

    return Events()


@pytest.fixture
def forget(monkeypatch):
    """Lets the next resolve() ask again, as a new launch would."""
    return lambda: monkeypatch.setenv("VLLM_METAL_HUB_RESOLVED", "{}")
