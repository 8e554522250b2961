"""Latent and sparse attention through vLLM's engine: tokens must be mlx-lm's."""

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from vllm import LLM, SamplingParams

COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = COMMON | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
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
}
SPARSE = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT | {"architectures": ["DeepseekV3ForCausalLM"]},
    "deepseek_v32": LATENT | SPARSE | {"architectures": ["DeepseekV32ForCausalLM"]},
}
PROMPTS = [[1, 5, 9, 17], [1, *range(10, 60)], [1, 33, 44], [1, *[7, 8, 9] * 9]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def mlx_lm_model(config: dict[str, Any]) -> Any:
    """Return mlx-lm's own model with random weights."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model


@pytest.fixture
def engine(make_engine: Callable[..., LLM], tmp_path: Path, model_dir: Path) -> Callable[..., LLM]:
    """Write a model of some kind and make an engine for it."""

    def make(config: dict[str, Any], model: Any) -> LLM:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_dir / file, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, metadata={"format": "mlx"})
        return make_engine(
            tmp_path, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32, kv_cache_memory_bytes=4 << 20
        )

    return make


def generate(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(inputs, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("kind", ["deepseek_v3", pytest.param("deepseek_v32", marks=pytest.mark.slow)])
def test_tokens_equal_mlx_lm(kind: str, engine: Callable[..., LLM]) -> None:
    config = CONFIGS[kind] | {"model_type": kind}
    model = mlx_lm_model(config)
    expected = [[int(t) for t, _ in generate_step(mx.array(p), model, max_tokens=12)] for p in PROMPTS]
    llm = engine(config, model)
    assert generate(llm, PROMPTS) == expected
    assert generate(llm, PROMPTS[1:2]) == expected[1:2]  # from the prefix cache
