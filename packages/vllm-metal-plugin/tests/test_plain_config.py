"""What transformers and vLLM have no class for is served all the same."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.tokenizers import cached_tokenizer_from_config

from metal_models import load
from metal_models.registry import build

SIZES = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NORM = {"rms_norm_eps": 1e-5, "intermediate_size": 96}
WRITTEN = Callable[[dict[str, Any]], Path]

# config.json -> what vLLM plans with: architecture, vocabulary, width, heads, length.
UNKNOWN: dict[str, tuple[dict[str, Any], tuple[str, int, int, int, int]]] = {
    "no class in transformers, none in vLLM": (
        {"model_type": "telechat3", "architectures": ["Telechat3ForCausalLM"], "num_key_value_heads": 2}
        | {"max_position_embeddings": 256, "rope_theta": 1e4, "mlp_bias": False, "attention_bias": False}
        | {"head_dim": 16} | SIZES | NORM,
        ("MlxLmForCausalLM", 160, 64, 4, 256),
    ),
    "its own names, code on the hub": (
        {"model_type": "lille-130m", "architectures": ["LilleForCausalLM"], "block_size": 128, "n_embd": 64}
        | {"auto_map": {"AutoConfig": "configuration_lille.LilleConfig"}, "layer_norm_eps": 1e-5, "n_kv_heads": 2}
        | {"n_layer": 2, "n_head": 4, "rope_theta": 1e4, "vocab_size": 160},
        ("MlxLmForCausalLM", 160, 64, 4, 128),
    ),
    "a class that refuses it": (
        {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "num_heads": 4, "head_dim": 16, "n_groups": 2}
        | {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "state_size": 8}
        | {"conv_kernel": 4, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True}
        | {"tie_word_embeddings": False, "time_step_limit": [0.0, 10.0], "time_step_rank": 4}
        | {"max_position_embeddings": 256},
        ("MlxLmForCausalLM", 160, 64, 4, 256),
    ),
    "a class of another model": (
        {"model_type": "pixtral", "architectures": ["LlavaForConditionalGeneration"]}
        | {"text_config": {"model_type": "llama", "max_position_embeddings": 256} | SIZES | NORM},
        ("MlxLmForCausalLM", 160, 64, 4, 256),
    ),
    "a processor that is not there": (
        {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"]}
        | {"text_config": {"n_routed_experts": None, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8}
           | {"v_head_dim": 16, "qk_nope_head_dim": 16, "num_key_value_heads": 4, "max_position_embeddings": 256}
           | {"model_type": "deepseek_v3", "moe_intermediate_size": 32} | SIZES | NORM},
        ("MlxLmForCausalLM", 160, 64, 4, 256),
    ),
    "no architectures": (
        {"model_type": "llama", "max_position_embeddings": 256} | SIZES | NORM,
        ("LlamaForCausalLM", 160, 64, 4, 256),
    ),
    "a pooling form of an unknown architecture": (
        {"model_type": "minicpm", "architectures": ["MiniCPMEmbeddingModel"], "num_key_value_heads": 2}
        | {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 12, "max_position_embeddings": 256} | SIZES | NORM,
        ("MlxLmEmbeddingModel", 160, 64, 4, 256),
    ),
}  # fmt: skip


@pytest.fixture
def written(model_dir: Path, tmp_path: Path) -> WRITTEN:
    """Writes a directory with random weights for a config."""

    def write(config: dict[str, Any]) -> Path:
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(model_dir / file, tmp_path)
        model = build(config)
        weights = {
            name: mx.random.normal(array.shape, key=mx.random.key(index)) / max(array.shape[-1], 1) ** 0.5
            for index, (name, array) in enumerate(tree_flatten(model.parameters()))
        }
        mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, metadata={"format": "mlx"})
        (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
        return tmp_path

    return write


@pytest.mark.parametrize("case", UNKNOWN)
def test_vllm_plans_with_the_sizes_of_the_model(case: str, written: WRITTEN) -> None:
    config, expected = UNKNOWN[case]
    model = EngineArgs(model=str(written(config))).create_engine_config().model_config
    found = (
        model.architecture,
        model.get_vocab_size(),
        model.get_hidden_size(),
        model.hf_text_config.num_attention_heads,
    )
    assert (*found, model.max_model_len) == expected
    assert cached_tokenizer_from_config(model).encode("w5 w6") == [5, 6]
    assert pickle.loads(pickle.dumps(model.hf_config)).to_dict() == copy.deepcopy(model.hf_config).to_dict()


def test_what_vllm_knows_stays_as_it_reads_it(model_dir: Path) -> None:
    model = EngineArgs(model=str(model_dir)).create_engine_config().model_config
    assert (type(model.hf_config).__name__, model.architecture) == ("LlamaConfig", "LlamaForCausalLM")


def test_errors_of_models_that_nobody_serves_are_those_of_vllm(written: WRITTEN) -> None:
    from vllm_metal_plugin.plain_config import PlainConfigParser

    directory = written({"model_type": "llama", "max_position_embeddings": 256} | SIZES | NORM)
    (directory / "config.json").write_text(json.dumps({"model_type": "whistle"}))
    with pytest.raises(ValueError, match="whistle"):
        PlainConfigParser().parse(directory, trust_remote_code=False)


@pytest.mark.slow
def test_the_engine_generates_with_a_recurrent_model_that_vllm_does_not_know(written: WRITTEN) -> None:
    low_ranks = dict.fromkeys(("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 8)
    config = {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "norm_eps": 1e-5, "head_dim": 16}
    config |= low_ranks | {"intermediate_size": 96, "tie_word_embeddings": False}
    config |= {name: value for name, value in SIZES.items() if name != "num_attention_heads"}
    directory = written(config)
    engine = LLM(str(directory), max_model_len=128, max_num_batched_tokens=64, max_num_seqs=4, disable_log_stats=True)
    prompts = [[1, 5, 9, 17, 33, 2, 8], [7, 8, 9] * 30]
    greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    module = load(directory).module
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = [int(token) for token, _ in generate_step(mx.array(prompt), module, max_tokens=6)]
        assert list(output.outputs[0].token_ids) == expected
