"""Models with recurrent layers through vLLM's engine: tokens must be mlx-lm's, whatever the scheduler does."""

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from vllm import LLM, SamplingParams

COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA_NET = COMMON | {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "intermediate_size": 96,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "rms_norm_eps": 1e-5,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "full_attention_interval": 4,
}
PROMPTS = [[1, 5, 9, 17], [1, *range(10, 80)], [1, 33, 44], [1, *[7, 8, 9] * 9], [1]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
Engine = Callable[..., LLM]
Tokens = Callable[[Sequence[int], int], list[int]]


@pytest.fixture(scope="module")
def delta_net(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokens]:
    """A directory with a small Qwen3-Next, and its greedy tokens as mlx-lm itself generates them."""
    directory = tmp_path_factory.mktemp("tiny-hybrid")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / file, directory)
    (directory / "config.json").write_text(json.dumps(DELTA_NET))
    module = importlib.import_module(f"mlx_lm.models.{DELTA_NET['model_type']}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(DELTA_NET))
    model.update(tree_map(lambda array: 3 * array if array.ndim > 1 else array, model.parameters()))
    model.eval()
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})

    def tokens(prompt: Sequence[int], count: int) -> list[int]:
        return [int(token) for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=count)]

    return directory, tokens


@pytest.fixture
def engine(make_engine: Engine, delta_net: tuple[Path, Tokens]) -> Engine:
    """Engines over the small Qwen3-Next."""
    return partial(
        make_engine,
        delta_net[0],
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_memory_bytes=4 << 20,
    )


def generate(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> Any:
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outputs], [out.num_cached_tokens for out in outputs]


def test_prefix_hits_start_from_the_state_at_the_end_of_a_block(
    engine: Engine, delta_net: tuple[Path, Tokens]
) -> None:
    llm = engine()
    expected = [delta_net[1](prompt, 12) for prompt in PROMPTS]
    assert generate(llm, PROMPTS) == (expected, [0] * len(PROMPTS))
    again, cached = generate(llm, [PROMPTS[1], [*PROMPTS[1][:68], 90, 91], *PROMPTS[2:]])
    assert again[0] == expected[1]
    assert again[1] == delta_net[1]([*PROMPTS[1][:68], 90, 91], 12)
    assert cached[:2] == [64, 64]


def test_without_prefix_caching_and_in_small_pieces(engine: Engine, delta_net: tuple[Path, Tokens]) -> None:
    llm = engine(enable_prefix_caching=False, max_num_batched_tokens=9)
    expected = [delta_net[1](prompt, 12) for prompt in PROMPTS]
    assert generate(llm, PROMPTS) == (expected, [0] * len(PROMPTS))
    assert generate(llm, PROMPTS[::-1])[0] == expected[::-1]


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_preempted_requests_resume(
    engine: Engine, delta_net: tuple[Path, Tokens], enable_prefix_caching: bool
) -> None:
    llm = engine(num_gpu_blocks_override=13, max_model_len=96, enable_prefix_caching=enable_prefix_caching)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, preempted = scheduler.schedule, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        preempted.extend(output.preempted_req_ids or ())
        return output

    scheduler.schedule = counting
    prompts = [[1, *range(10 + i, 36 + i)] for i in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
    assert generate(llm, prompts, params)[0] == [delta_net[1](prompt, 50) for prompt in prompts]
    assert preempted


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int8_per_token_head"])
def test_states_beside_quantised_rows(engine: Engine, delta_net: tuple[Path, Tokens], kv_cache_dtype: str) -> None:
    """Rows of 8 bits put 80 tokens into the page of a state; tokens are nearly those of full precision."""
    llm = engine(kv_cache_dtype=kv_cache_dtype)
    prompts = [*PROMPTS, [1, *range(10, 110)]]
    first, cached = generate(llm, prompts)
    assert cached == [0] * len(prompts)
    expected = [delta_net[1](prompt, 12) for prompt in prompts]
    same = [got == want for pair in zip(first, expected, strict=True) for got, want in zip(*pair, strict=True)]
    assert sum(same) > 0.7 * len(same)
    again, cached = generate(llm, prompts)
    assert again == first
    assert cached[-1] == 80


def test_wrong_drafts_are_taken_back_from_states(engine: Engine) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True, allowed_token_ids=[5, 9, 17])
    plain = generate(engine(enable_prefix_caching=False), PROMPTS, params)
    llm = engine(speculative_config=drafts, disable_log_stats=False)
    assert not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    assert generate(llm, PROMPTS, params) == plain
    names = [f"vllm:spec_decode_num_{kind}_tokens" for kind in ("draft", "accepted")]
    drafted, kept = (sum(metric.value for metric in llm.get_metrics() if metric.name == name) for name in names)
    assert drafted > kept > 0
