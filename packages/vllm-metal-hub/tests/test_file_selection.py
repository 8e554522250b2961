import json

import pytest

from vllm_metal_hub.errors import NotFoundError, UsageError
from vllm_metal_hub.file_selection import INDEX, select
from vllm_metal_hub.model_ref import parse
from vllm_metal_hub.snapshot import FileEntry


def entries(*names):
    return [FileEntry(name, 1) for name in names]


def names(ref, *listing, index=None):
    text = json.dumps({"weight_map": index}) if index else None
    return [e.path for e in select(parse(ref), entries(*listing), text)]


def test_safetensors_and_small_files_without_duplicates_of_the_weights():
    assert names(
        "o/n", "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "README.md",
        "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "1_Pooling/config.json",
        "pytorch_model.bin",
        ".gitattributes", "picture.png",
    ) == [
        "1_Pooling/config.json", "README.md", "chat_template.jinja", "config.json", "model.safetensors",
        "tokenizer.json",
    ]  # fmt: skip


def test_layers_on_top_of_embedding_models():
    assert names(
        "o/n", "config.json", "pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt", "long.pt",
    ) == ["colbert_linear.pt", "config.json", "pytorch_model.bin", "sparse_linear.pt"]  # fmt: skip
    assert names(
        "o/n", "model.safetensors", "2_Dense/config.json", "2_Dense/pytorch_model.bin", "2_Dense/model.safetensors",
        "3_Dense/pytorch_model.bin", "extra/model.safetensors",
    ) == [
        "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin", "model.safetensors",
    ]  # fmt: skip


def test_the_index_decides_which_shards():
    found = names(
        "o/n", "config.json", INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model-00001-of-00003.safetensors",
        index={"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    )  # fmt: skip
    assert [n for n in found if n.endswith("safetensors")] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip


def test_a_shard_that_the_index_names_and_the_listing_lacks():
    with pytest.raises(NotFoundError, match="every shard"):
        names("o/n", "config.json", INDEX, index={"a": "model-00001-of-00001.safetensors"})


def test_one_gguf_is_taken_and_several_need_a_name():
    assert names("o/n", "x-Q4_0.gguf", "config.json") == ["config.json", "x-Q4_0.gguf"]
    with pytest.raises(UsageError, match=":QUANT"):
        names("o/n", "x-Q4_0.gguf", "x-Q8_0.gguf")
    assert names("o/n:q8_0", "x-Q4_0.gguf", "x-Q8_0.gguf", "mmproj-Q8_0.gguf") == ["x-Q8_0.gguf"]
    assert names("o/n:Q4_K", "x-Q4_K.gguf", "x-Q4_K_M.gguf", "x-Q8_0.gguf")[0] == "x-Q4_K.gguf"
    assert names("o/n/x-Q4_0.gguf", "x-Q4_0.gguf", "x-Q8_0.gguf") == ["x-Q4_0.gguf"]
    with pytest.raises(NotFoundError, match="Choose one of them"):
        names("o/n:Q2_K", "x-Q4_0.gguf", "x-Q8_0.gguf")


def test_shards_of_one_quantisation_stay_together():
    assert names("o/n:Q8_0", "x-Q8_0-00001-of-00002.gguf", "x-Q8_0-00002-of-00002.gguf", "x-Q4_0.gguf") == [
        "x-Q8_0-00001-of-00002.gguf", "x-Q8_0-00002-of-00002.gguf",
    ]  # fmt: skip


def test_old_formats_only_where_there_is_nothing_better():
    assert names("o/n", "config.json", "weights.npz") == ["config.json", "weights.npz"]
    with pytest.raises(NotFoundError, match="weights"):
        names("o/n", "config.json", "README.md")


@pytest.mark.parametrize("bad", ["/etc/passwd", "../x.json", "a/../../x.json", "a\\b.json"])
def test_listings_cannot_write_elsewhere(bad):
    with pytest.raises(UsageError, match="relative file names"):
        names("o/n", "model.safetensors", bad)


def test_names_that_a_mac_cannot_tell_apart():
    with pytest.raises(UsageError, match="case"):
        names("o/n", "model.safetensors", "Config.json", "config.json")
