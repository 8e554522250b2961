"""Latent attention with experts behind the real server: the client gets mlx-lm's tokens."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from live_server import serving
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.deepseek_v3 import Model, ModelArgs

from vllm_metal_hub.testing.tiny_model import tokenizer_files

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 512,
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
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PROMPTS = ([1, 5, 9, 17], [1, *range(10, 80)], [1, *range(10, 75), 90])
FLAGS = ("--served-model-name", "tiny", "--max-model-len", "128", "--kv-cache-memory-bytes", str(4 << 20))


def write_model(directory: Path) -> Any:
    """Write a random model; return mlx-lm's of the same weights."""
    mx.random.seed(3)
    model = Model(ModelArgs.from_dict(CONFIG))
    for name, gate in model.named_modules():
        if name.endswith(".gate"):  # mlx-lm makes it of zeros, which choose the same experts always
            gate.weight = mx.random.normal(gate.weight.shape)
    model.update(tree_map(lambda array: 3 * array if array.ndim > 1 else array, model.parameters()))
    directory.mkdir()
    for name, content in (tokenizer_files() | {"config.json": json.dumps(CONFIG).encode()}).items():
        (directory / name).write_bytes(content)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return model


def test_tokens_are_mlx_lms(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 10, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True, "return_token_ids": True}
    with serving(tmp_path / "tiny", tmp_path / "log", *FLAGS) as server, server.client() as client:
        for prompt in PROMPTS:
            expected = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=10)]
            answer = client.completions.create(prompt=prompt, **options)
            assert answer.choices[0].token_ids == expected  # type: ignore[attr-defined]
