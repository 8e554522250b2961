"""Models with recurrent layers and with latent attention behind the real server: the client gets mlx-lm's tokens."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import openai
import pytest
from live_server import serving
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 160
CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "rope_theta": 10000.0,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config["model_type"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="module")
def model(config: dict[str, Any]) -> Any:
    mx.random.seed(3)
    code = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    module = code.Model(code.ModelArgs.from_dict(config))
    module.update(tree_map(lambda array: 3 * array if array.ndim > 1 else array, module.parameters()))
    mx.eval(module.parameters())
    return module


@pytest.fixture(scope="module")
def client(config: dict[str, Any], model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    directory: Path = tmp_path_factory.mktemp("tiny")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    flags = ("--served-model-name", "tiny", "--max-model-len", "128", "--kv-cache-memory-bytes", "4194304")
    with serving(directory, tmp_path_factory.mktemp("log") / "log", *flags) as running, running.client() as connected:
        yield connected


@pytest.mark.parametrize("prompt", [[1, 5, 9, 17], [1, *range(10, 80)], [1, *range(10, 75), 90]])
def test_tokens_are_mlx_lms(client: openai.OpenAI, model: Any, prompt: list[int]) -> None:
    expected = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=10)]
    answer = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=10,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.choices[0].token_ids == expected  # type: ignore[attr-defined]
