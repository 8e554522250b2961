import pytest

from vllm_metal_hub.errors import UsageError
from vllm_metal_hub.model_ref import parse


@pytest.mark.parametrize(
    ("text", "repo", "source", "revision", "quant", "file"),
    [
        ("owner/name", "owner/name", None, None, None, None),
        ("gpt2", "gpt2", None, None, None, None),
        ("owner/na.me-4bit_x@v1.0", "owner/na.me-4bit_x", None, "v1.0", None, None),
        ("hf://owner/name@feature/x", "owner/name", "huggingface", "feature/x", None, None),
        ("ms://owner/name", "owner/name", "modelscope", None, None, None),
        ("owner/name-GGUF:Q4_K_M", "owner/name-GGUF", None, None, "Q4_K_M", None),
        ("owner/name-GGUF:Q4_K_M@abc", "owner/name-GGUF", None, "abc", "Q4_K_M", None),
        ("owner/name/sub/x.gguf", "owner/name", None, None, None, "sub/x.gguf"),
    ],
)
def test_hub_references(text, repo, source, revision, quant, file):
    ref = parse(text)
    assert (ref.repo, ref.source, ref.revision, ref.quant, ref.file) == (repo, source, revision, quant, file)
    assert ref.path is None


@pytest.mark.parametrize("text", ["", "a/b/c", "a//b", "owner/../x", "http://x/y", "owner/name@", "o--x/n", "a b/c"])
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(UsageError, match="expected a path"):
        parse(text)


def test_paths_are_local_and_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert parse("owner/name").path == tmp_path / "owner" / "name"
    assert parse("./not-there").path == tmp_path / "not-there"
    assert parse("/somewhere/x.gguf").path is not None


def test_two_revisions_must_agree():
    assert parse("o/n@v1", "v1").revision == "v1"
    with pytest.raises(UsageError, match="expected one revision"):
        parse("o/n@v1", "v2")
