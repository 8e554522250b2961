import gguf
import numpy as np
import pytest

from metal_models.errors import CheckpointError, UnsupportedModelError
from metal_models.gguf import find_gguf, gguf_config
from metal_models.gguf.file import GGUFFile


def write(path, arch="llama", *, tensors=None, **metadata):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, value in (tensors or {"token_embd.weight": np.ones((4, 32), np.float32)}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = {
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def test_metadata_and_tensors_are_read(tmp_path):
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    path = write(
        tmp_path / "a.gguf",
        tensors={"one.weight": values, "two.weight": values.astype(np.float16)},
        words=["a", "ü"],
        numbers=[1, 2, 3],
        flag=True,
        text="hi",
        half=0.5,
    )
    file = GGUFFile.open(path)
    assert file.architecture == "llama"
    assert file.metadata["words"] == ["a", "ü"]
    assert file.metadata["numbers"].tolist() == [1, 2, 3]
    assert (file.metadata["flag"], file.metadata["text"], file.metadata["half"]) == (True, "hi", 0.5)
    assert file.tensors["two.weight"].shape == (2, 32)
    assert file.tensors["two.weight"].type.name == "F16"
    np.testing.assert_array_equal(file.rows("one.weight").view(np.float32), values)


@pytest.mark.parametrize("kept", [0, 10, 40, 150, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = write(tmp_path / "a.gguf", **LLAMA)
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        GGUFFile.open(path)


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(CheckpointError, match="expected a little-endian GGUF file"):
        GGUFFile.open(path)


def test_a_directory_must_have_one_file(tmp_path):
    with pytest.raises(CheckpointError, match="got none"):
        find_gguf(tmp_path)
    first = write(tmp_path / "a.gguf")
    write(tmp_path / "mmproj-a.gguf")
    assert find_gguf(tmp_path) == first
    write(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        find_gguf(tmp_path)


def test_config(tmp_path):
    config = gguf_config(write(tmp_path / "a.gguf", **LLAMA))
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert (config["vocab_size"], config["num_key_value_heads"], config["head_dim"]) == (4, 4, 8)
    assert config["tie_word_embeddings"] is True
    assert config["torch_dtype"] == "float32"
    assert "rope_scaling" not in config


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModelError, match="'wavenet'"):
        gguf_config(write(tmp_path / "a.gguf", "wavenet"))


def test_a_missing_value_is_named(tmp_path):
    rest = {key: value for key, value in LLAMA.items() if key != "llama.block_count"}
    with pytest.raises(CheckpointError, match=r"llama\.block_count"):
        gguf_config(write(tmp_path / "a.gguf", **rest))


def test_values_that_differ_by_layer_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="head_count_kv"):
        gguf_config(write(tmp_path / "a.gguf", **LLAMA, **{"llama.attention.head_count_kv": [1, 2]}))


def test_a_part_of_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        gguf_config(write(tmp_path / "a.gguf", **LLAMA, **{"split.count": 3}))


def test_linear_and_yarn_rope_scaling(tmp_path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = gguf_config(write(tmp_path / "a.gguf", **LLAMA, **linear))
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    config = gguf_config(write(tmp_path / "b.gguf", **LLAMA, **yarn))
    assert config["rope_scaling"]["original_max_position_embeddings"] == 32


def test_llama3_factors_are_recognised(tmp_path):
    """The factors of Llama 3.2 1B (head size 64), as its converter computes them."""
    factor, low, high, original, theta, width = 32.0, 1.0, 4.0, 8192, 500000.0, 64
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, width, 2) / width):
        wave = 2 * np.pi / frequency
        if wave < original / high:
            factors.append(1.0)
        elif wave > original / low:
            factors.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    tensors = {
        "token_embd.weight": np.ones((4, 32), np.float32),
        "rope_freqs.weight": np.array(factors, np.float32),
    }
    metadata = LLAMA | {"llama.rope.freq_base": theta}
    config = gguf_config(write(tmp_path / "a.gguf", tensors=tensors, **metadata))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    tensors["rope_freqs.weight"][3] = 7.0
    with pytest.raises(UnsupportedModelError, match="RoPE factors"):
        gguf_config(write(tmp_path / "b.gguf", tensors=tensors, **metadata))


def test_a_templates_end_of_turn_is_an_eos(tmp_path):
    tokens = {
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<|im_end|>", "x"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<|im_end|>",
    }
    config = gguf_config(write(tmp_path / "a.gguf", **LLAMA, **tokens))
    assert config["eos_token_id"] == [1, 2]
    assert config["bos_token_id"] == 0
