"""A small random llama with its own tokenizer, written as a model directory."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

VOCAB = 160
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 256,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_model(directory: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs.from_dict(CONFIG))
    rng = np.random.default_rng(0)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        scale = 0.25 if array.ndim > 1 else 1.0
        values = scale * rng.standard_normal(array.shape) if array.ndim > 1 else np.ones(array.shape)
        weights[name] = mx.array(values.astype(np.float32))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that vLLM, mlx-lm and transformers can read."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    _write_model(directory)
    _write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def mlx_lm_tokens(model_dir: Path) -> Callable[[Sequence[int], int], list[int]]:
    """Greedy tokens as mlx-lm itself generates them."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(model_dir)

    def generate(prompt: Sequence[int], max_tokens: int) -> list[int]:
        steps = generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens)
        return [int(token) for token, _ in steps]

    return generate


@pytest.fixture(scope="session")
def mlx_lm_logprobs(model_dir: Path) -> Callable[[Sequence[int]], np.ndarray]:
    """Log probabilities of the token after each position, as mlx-lm's model gives them."""
    from mlx_lm.utils import load_model

    model, _ = load_model(model_dir)

    def logprobs(token_ids: Sequence[int]) -> np.ndarray:
        logits = model(mx.array([list(token_ids)]))[0]
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return logprobs
