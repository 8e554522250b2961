import json
import os

import gguf
import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from metal_models.errors import CheckpointError, UnsupportedModelError
from metal_models.gguf import write_sidecar

BYTES = list(bytes_to_unicode().values())
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "Ċ Ċ"]
CONTROLS = ["<s>", "</s>", "<|im_end|>"]
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": CONTROLS + BYTES + [merge.replace(" ", "") for merge in MERGES],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(BYTES) + len(MERGES)),
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
}
PIECES = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello"]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES],
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES), 0, -1)],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def write(path, tokenizer, **metadata):
    """A file with a tokenizer, a config and an embedding: enough for everything but running it."""
    writer = gguf.GGUFWriter(path, "llama")
    llama = {
        "llama.embedding_length": 32,
        "llama.block_count": 1,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    for key, value in (llama | tokenizer | metadata).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    rows = len(tokenizer["tokenizer.ggml.tokens"])
    writer.add_tensor("token_embd.weight", np.ones((rows, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(tokenizer, text, **options):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options).input_ids)


def test_the_directory_is_complete(tmp_path):
    path = write(tmp_path / "tiny.gguf", BYTE_LEVEL, **{"general.sampling.temp": 0.5})
    sidecar = write_sidecar(path, tmp_path / "out")

    assert (sidecar / "tiny.gguf").samefile(path)
    config = AutoConfig.from_pretrained(sidecar)
    assert (config.model_type, config.vocab_size) == ("llama", len(BYTE_LEVEL["tokenizer.ggml.tokens"]))
    assert json.loads((sidecar / "config.json").read_text())["metal_gguf"] == "tiny.gguf"
    generation = json.loads((sidecar / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 2], "temperature": 0.5}
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [sidecar.name]


def test_it_is_written_once_per_state_of_the_file(tmp_path):
    path = write(tmp_path / "tiny.gguf", BYTE_LEVEL)
    first = write_sidecar(path, tmp_path / "out")
    stamp = (first / "config.json").stat().st_mtime_ns
    assert write_sidecar(path, tmp_path / "out") == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    os.utime(path, ns=(1, 1))
    assert write_sidecar(path, tmp_path / "out") != first


def test_a_link_keeps_its_name(tmp_path):
    """Hugging Face's cache links names to files that are called by their hash."""
    write(tmp_path / "0123abcd", BYTE_LEVEL)
    (tmp_path / "model.gguf").symlink_to(tmp_path / "0123abcd")
    sidecar = write_sidecar(tmp_path / "model.gguf", tmp_path / "out")
    assert (sidecar / "model.gguf").samefile(tmp_path / "0123abcd")


def test_a_failure_leaves_nothing(tmp_path):
    path = write(tmp_path / "tiny.gguf", BYTE_LEVEL | {"tokenizer.ggml.model": "unheard-of"})
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        write_sidecar(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(CheckpointError):
        write_sidecar(tmp_path / "absent.gguf", tmp_path / "out")


def test_byte_level_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(
        write_sidecar(write(tmp_path / "tiny.gguf", BYTE_LEVEL), tmp_path / "out")
    )
    assert pieces(tokenizer, "hello") == ["hello"]
    # The rules of "smollm": every digit is a word, so "12" is not merged, and neither is a word of line ends cut.
    assert pieces(tokenizer, "hello\n\n12") == ["hello", "ĊĊ", "1", "2"]
    assert pieces(tokenizer, "hello<|im_end|>") == ["hello", "<|im_end|>"]
    for text in ("", "hello  world\n\n 3.14", "naïve 日本 🙂\t"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == ("hello<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 1, 128)


def test_words_the_rules_of_which_are_not_known_give_a_warning(tmp_path, caplog):
    write_sidecar(write(tmp_path / "tiny.gguf", BYTE_LEVEL | {"tokenizer.ggml.pre": "unheard-of"}), tmp_path / "out")
    assert "'unheard-of'" in caplog.text


def test_sentencepiece_tokenizer_starts_with_bos(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(
        write_sidecar(write(tmp_path / "tiny.gguf", SENTENCEPIECE), tmp_path / "out")
    )
    assert pieces(tokenizer, "hello") == ["<s>", "▁hello"]
    assert pieces(tokenizer, "hello", add_special_tokens=False) == ["▁hello"]
    ids = tokenizer("hello é").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello é"


def test_start_and_end_tokens_as_the_file_says(tmp_path):
    ends = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    path = write(tmp_path / "tiny.gguf", BYTE_LEVEL, **ends)
    tokenizer = AutoTokenizer.from_pretrained(write_sidecar(path, tmp_path / "out"))
    assert pieces(tokenizer, "hello") == ["<s>", "hello", "</s>"]
    path = write(tmp_path / "other.gguf", SENTENCEPIECE, **{"tokenizer.ggml.add_bos_token": False})
    tokenizer = AutoTokenizer.from_pretrained(write_sidecar(path, tmp_path / "out"))
    assert pieces(tokenizer, "hello") == ["▁hello"]
