"""Adapters through vLLM's engine, in process: tokens must be those of mlx-lm's model with merged weights."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

PROMPTS = [[1, 5, 9, 17], [1, *range(10, 60)], [1, 33, 44], [1, *[7, 8, 9] * 9], [1, 3]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
TARGETS = ("q_proj", "down_proj")
SCALE = 2.0
SHAPES = {"q_proj": (64, 64), "down_proj": (64, 128)}


def write_adapter(directory: Path, seed: int, rank: int = 4) -> Path:
    """A random adapter for the tiny llama."""
    directory.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        for target in TARGETS:
            output, inputs = SHAPES[target]
            part = "self_attn" if target == "q_proj" else "mlp"
            name = f"base_model.model.model.layers.{layer}.{part}.{target}"
            for letter, shape in (("A", (rank, inputs)), ("B", (output, rank))):
                tensors[f"{name}.lora_{letter}.weight"] = mx.array(rng.normal(0, 0.3, shape).astype(np.float32))
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), tensors)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": SCALE * rank, "target_modules": list(TARGETS)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def merged_tokens(model_dir: Path, adapter: Path | None, prompt: Sequence[int]) -> list[int]:
    model, _ = load_model(model_dir)
    tensors = mx.load(str(adapter / "adapter_model.safetensors")) if adapter else {}
    for name, module in model.named_modules():
        a = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None:
            module.weight = module.weight + SCALE * tensors[f"base_model.model.{name}.lora_B.weight"] @ a
    return [int(token) for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=12)]


@pytest.fixture
def engine(make_engine: Callable[..., LLM], model_dir: Path) -> Callable[..., LLM]:
    """Engines over the tiny llama that take adapters."""
    return partial(
        make_engine,
        model_dir,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        kv_cache_memory_bytes=4 << 20,
    )


def generate(llm: LLM, adapters: Sequence[LoRARequest | None]) -> list[list[int]]:
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(inputs, GREEDY, lora_request=list(adapters), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_adapters_and_the_base_in_one_batch(engine: Callable[..., LLM], model_dir: Path, tmp_path: Path) -> None:
    """Three adapters take turns in room for two, beside requests without one."""
    paths = [write_adapter(tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    requests = [LoRARequest(f"adapter-{i}", i + 1, str(path)) for i, path in enumerate(paths)]
    order = [0, None, 1, 2, 0]
    llm = engine()
    got = generate(llm, [None if i is None else requests[i] for i in order])
    expected = [
        merged_tokens(model_dir, None if i is None else paths[i], prompt)
        for i, prompt in zip(order, PROMPTS, strict=True)
    ]
    assert got == expected
    assert len(llm.llm_engine.list_loras()) == 2
    assert generate(llm, [None] * 5)[1] == expected[1]


def test_adapters_over_contiguous_caches(
    engine: Callable[..., LLM], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time from kept prefixes, which are those of the same adapter."""
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    paths = [write_adapter(tmp_path / str(seed), seed) for seed in (1, 2)]
    requests = [LoRARequest(f"adapter-{i}", i + 1, str(path)) for i, path in enumerate(paths)]
    llm = engine()
    for order in ([0, None, 1, 1, 0], [1, 0, None, 0, 1], [0, None, 1, 1, 0]):
        got = generate(llm, [None if i is None else requests[i] for i in order])
        expected = [
            merged_tokens(model_dir, None if i is None else paths[i], prompt)
            for i, prompt in zip(order, PROMPTS, strict=True)
        ]
        assert got == expected


def test_adapters_are_added_pinned_replaced_and_removed(
    engine: Callable[..., LLM], model_dir: Path, tmp_path: Path
) -> None:
    core = engine().llm_engine
    paths = [write_adapter(tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    for number, path in enumerate(paths[:2], 1):
        assert core.add_lora(LoRARequest(f"adapter-{number}", number, str(path)))
    assert core.pin_lora(1)
    assert not core.pin_lora(9)
    assert core.add_lora(LoRARequest("adapter-3", 3, str(paths[2])))
    assert core.list_loras() == {1, 3}
    assert core.remove_lora(3)
    assert not core.remove_lora(3)
    assert core.list_loras() == {1}


@pytest.mark.parametrize("what", ["rank", "missing tensor", "no directory"])
def test_bad_adapter_is_an_error_and_the_engine_goes_on(
    engine: Callable[..., LLM], model_dir: Path, tmp_path: Path, what: str
) -> None:
    llm = engine()
    path = write_adapter(tmp_path / "bad", 1, rank=16 if what == "rank" else 4)
    if what == "missing tensor":
        tensors = mx.load(str(path / "adapter_model.safetensors"))
        del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
        mx.save_safetensors(str(path / "adapter_model.safetensors"), tensors)
    if what == "no directory":
        path = tmp_path / "nowhere"
    with pytest.raises(Exception, match=r"--max-lora-rank|lora_B|nowhere"):
        llm.llm_engine.add_lora(LoRARequest("bad", 1, str(path)))
    assert generate(llm, [None] * 5)[0] == merged_tokens(model_dir, None, PROMPTS[0])
