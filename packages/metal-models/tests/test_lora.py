"""Adapters per row give what a model with merged weights gives; adapters that do not fit are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from metal_models import AdapterError, MetalModelsError, PagedModel

TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
Tensors = dict[str, mx.array]


def modules(model: PagedModel, targets: tuple[str, ...] = TARGETS) -> list[str]:
    return [name for name, _ in model.module.named_modules() if name.rpartition(".")[2] in targets]


def tensors_for(plain: PagedModel, seed: int, rank: int = 4, targets: tuple[str, ...] = TARGETS) -> Tensors:
    """Random matrices for every target of a model with plain weights."""
    rng = np.random.default_rng(seed)
    tensors = {}
    shapes = dict(tree_flatten(plain.module.parameters()))
    for name in modules(plain, targets):
        output, inputs = shapes[f"{name}.weight"].shape
        for part, shape in (("A", (rank, inputs)), ("B", (output, rank))):
            array = mx.array((0.3 * rng.standard_normal(shape)).astype(np.float32))
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = array
    return tensors


def save(directory: Path, tensors: Tensors, **settings: Any) -> Path:
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config | settings))
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), tensors)
    return directory


def merge(model: PagedModel, tensors: Tensors, scale: float) -> PagedModel:
    """Add the adapter's products to a model's weights, for good."""
    weights = dict(tree_flatten(model.module.parameters()))
    for name in [key for key in tensors if key.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")]
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + scale * (b @ tensors[name])
    model.module.update(tree_unflatten(list(weights.items())))
    return model


def greedy(lab: SimpleNamespace, model: PagedModel, prompts: list[list[int]], adapters: list[int]) -> list[Any]:
    """Serve prompts together, in pieces, each with an adapter; return tokens and log-probabilities."""
    server = lab.Server(model)
    requests = [server.request(prompt) for prompt in prompts]
    number = {id(request): adapter for request, adapter in zip(requests, adapters, strict=True)}
    running = list(requests)
    while running:
        work = [(r, min(5, len(r.tokens) - r.computed)) for r in running]
        work.sort(key=lambda item: item[1] > 1)
        rows = np.concatenate([np.full(count, number[id(r)], np.int32) for r, count in work])
        with model.lora.applied(rows):
            server.step(work)
        running = [r for r in running if len(r.logprobs) < 5]
    return [(r.tokens, np.stack(r.logprobs)) for r in requests]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_two_adapters_and_the_base_in_one_batch(
    architecture: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace, tmp_path: Path
) -> None:
    model, prompts = tiny(architecture), lab.prompts(tiny(architecture).vocab_size, (7, 13, 9, 4))
    first, second = tensors_for(model, 1), tensors_for(model, 2, rank=2, targets=("q_proj", "gate_proj"))
    model.lora.add(7, model.lora.load(save(tmp_path / "a", first), max_rank=8))
    path = save(tmp_path / "b", second, r=2, use_rslora=True, target_modules=["q_proj", "gate_proj"])
    model.lora.add(3, model.lora.load(path, max_rank=8))
    got = greedy(lab, model, prompts, [7, 0, 3, 7])
    plain = greedy(lab, tiny(architecture), prompts[1:2], [0])
    merged = greedy(lab, merge(tiny(architecture), first, 2.0), [prompts[0], prompts[3]], [0, 0])
    other = greedy(lab, merge(tiny(architecture), second, 8 / 2**0.5), prompts[2:3], [0])
    for (tokens, logprobs), (expected, wanted) in zip(got, [merged[0], *plain, *other, merged[1]], strict=True):
        assert tokens == expected
        np.testing.assert_allclose(logprobs, wanted, rtol=1e-4, atol=5e-4)
    assert greedy(lab, model, prompts, [0] * 4)[1][0] == plain[0][0]


def test_on_a_quantised_base(tiny: Callable[..., PagedModel], lab: SimpleNamespace, tmp_path: Path) -> None:
    """The same as a model whose expanded weights are merged."""
    from mlx_lm.utils import dequantize_model

    model, prompts = tiny("qwen3", bits=4), lab.prompts(tiny("qwen3").vocab_size, (6, 9))
    tensors = tensors_for(tiny("qwen3"), 1)
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.module.parameters()))
    model.lora.add(1, model.lora.load(save(tmp_path / "a", tensors), max_rank=8))
    assert sum(array.nbytes for _, array in tree_flatten(model.module.parameters())) == nbytes
    expanded = tiny("qwen3", bits=4)
    dequantize_model(expanded.module)
    got = greedy(lab, model, prompts, [1, 0])
    expected = [
        *greedy(lab, merge(PagedModel(expanded.module, expanded.config), tensors, 2.0), prompts[:1], [0]),
        *greedy(lab, tiny("qwen3", bits=4), prompts[1:], [0]),
    ]
    for (tokens, logprobs), (wanted, values) in zip(got, expected, strict=True):
        assert tokens == wanted
        np.testing.assert_allclose(logprobs, values, rtol=1e-3, atol=2e-3)


def test_some_rows_of_a_step(tiny: Callable[..., PagedModel], tmp_path: Path) -> None:
    model = tiny("qwen3")
    for number in (1, 2):
        tensors = tensors_for(model, number)
        model.lora.add(number, model.lora.load(save(tmp_path / f"{number}", tensors), max_rank=8))
    layer = model.module.model.layers[0].self_attn.q_proj
    x = mx.random.normal((5, layer.weight.shape[1]))
    ids = np.array([1, 0, 2, 1, 0], np.int32)
    with model.lora.applied(ids):
        whole = np.array(layer(x))
        for rows in ([3, 2], [1, 4], [0]):
            with model.lora.among(np.array(rows, np.int32)):
                np.testing.assert_allclose(layer(x[mx.array(rows)]), whole[rows], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer(x), whole, rtol=1e-5, atol=1e-5)


def test_ranks_and_scales_of_single_modules(tiny: Callable[..., PagedModel], tmp_path: Path) -> None:
    model = tiny("qwen3")
    tensors = tensors_for(model, 1, rank=2, targets=("q_proj",)) | tensors_for(model, 2, targets=("v_proj",))
    settings = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 6}}
    path = save(tmp_path / "a", tensors, target_modules=["q_proj", "v_proj"], **settings)
    adapter = model.lora.load(path, max_rank=4)
    for module, scale in (("layers.0.self_attn.q_proj", 3.0), ("layers.1.self_attn.q_proj", 4.0)):
        b = tensors[f"base_model.model.model.{module}.lora_B.weight"]
        np.testing.assert_allclose(adapter.layers[f"model.{module}"].b, scale * b.T, rtol=1e-6)
    assert adapter.nbytes < model.lora.bytes_at_rank(4)


def test_replaced_and_removed(tiny: Callable[..., PagedModel], lab: SimpleNamespace, tmp_path: Path) -> None:
    model, prompts = tiny("qwen3"), lab.prompts(tiny("qwen3").vocab_size, (6,))
    adapters = [model.lora.load(save(tmp_path / "a", tensors_for(model, seed)), max_rank=8) for seed in (1, 2)]
    texts = []
    for adapter in adapters:
        model.lora.add(1, adapter)
        texts.append(greedy(lab, model, prompts, [1])[0][0])
    assert texts[0] != texts[1]
    assert model.lora.ids == {1}
    assert model.lora.remove(1)
    assert not model.lora.remove(1)
    with pytest.raises(MetalModelsError, match="number 1"):
        greedy(lab, model, prompts, [1])


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({}, lambda t: t.pop(next(n for n in t if "lora_B" in n)), "lora_B.weight"),
        ({}, lambda t: [t.pop(n) for n in list(t) if "layers.0.self_attn.q_proj" in n], "layers.0.self_attn.q_proj"),
        ({}, lambda t: t.update({n: t[n][:, :-1] for n in t if "layers.1.mlp.down_proj.lora_A" in n}), "of shape"),
        ({}, lambda t: t.update({n.replace("q_proj", "qkv"): a for n, a in t.items() if "q_proj" in n}), "qkv"),
        ({}, lambda t: t.update({"base_model.model.lm_head.weight": mx.zeros((2, 2))}), "lm_head"),
        ({"r": 16}, lambda t: None, "--max-lora-rank"),
        ({"r": "4"}, lambda t: None, "r and lora_alpha"),
        ({"use_dora": True}, lambda t: None, "use_dora"),
        ({"init_lora_weights": "pissa"}, lambda t: None, "pissa"),
        ({"peft_type": "IA3"}, lambda t: None, "peft_type"),
    ],
)
def test_adapters_that_do_not_fit(
    tiny: Callable[..., PagedModel], tmp_path: Path, settings: dict[str, Any], change: Any, words: str
) -> None:
    model = tiny("qwen3")
    tensors = tensors_for(model, 1)
    change(tensors)
    with pytest.raises(AdapterError, match=words.replace(".", r"\.")):
        model.lora.load(save(tmp_path / "a", tensors, **settings), max_rank=8)


def test_missing_and_damaged_files(tiny: Callable[..., PagedModel], tmp_path: Path) -> None:
    model = tiny("qwen3")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        model.lora.load(tmp_path / "nowhere", max_rank=8)
    path = save(tmp_path / "a", tensors_for(model, 1))
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError, match="safetensors"):
        model.lora.load(path, max_rank=8)
    weights.unlink()
    with pytest.raises(AdapterError, match="adapter_model"):
        model.lora.load(path, max_rank=8)


@pytest.mark.parametrize(("architecture", "end"), [("qwen3_next", "linear_attn.out_proj"), ("dbrx", "experts.1.w1")])
def test_layers_that_do_not_see_all_rows_are_not_adapted(
    tiny: Callable[..., PagedModel], tmp_path: Path, architecture: str, end: str
) -> None:
    model = tiny(architecture)
    name = next(name for name, _ in model.module.named_modules() if name.endswith(end))
    tensors = {
        f"base_model.model.{name}.lora_A.weight": mx.zeros((4, 8)),
        f"base_model.model.{name}.lora_B.weight": mx.zeros((8, 4)),
    }
    with pytest.raises(AdapterError, match=end):
        model.lora.load(save(tmp_path / "a", tensors, target_modules=[end.rpartition(".")[2]]), max_rank=8)
