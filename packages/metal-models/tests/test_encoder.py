"""Encoders: hidden rows of ragged batches must be those of transformers' models, one prompt at a time."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

from metal_models import CheckpointError, MetalModelsError, UnsupportedModelError, load_encoder
from metal_models.encoders import is_encoder
from metal_models.registry import supported

LENGTHS = (1, 7, 60, 90, 35, 3, 41, 60)
SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
MODELS: dict[str, Any] = {
    "bert": lambda **kw: transformers.BertModel(transformers.BertConfig(**SIZES | kw)),
    "roberta": lambda **kw: transformers.RobertaModel(transformers.RobertaConfig(**SIZES | kw)),
    "xlm-roberta": lambda **kw: transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(**SIZES | {"type_vocab_size": 1} | kw)
    ),
    "modernbert": lambda **kw: transformers.ModernBertModel(
        transformers.ModernBertConfig(**SIZES | {"local_attention": 16, "pad_token_id": 0} | kw)
    ),
}


def torch_model(name: str, **options: Any) -> torch.nn.Module:
    """A random model whose norms and biases matter, too."""
    torch.manual_seed(0)
    model = MODELS[name](**options).eval()
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
        parameter.data = scale * torch.randn_like(parameter) + (parameter.data if parameter.ndim == 1 else 0)
    return model


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, SIZES["vocab_size"], length).astype(np.int32) for length in lengths]


def starts(sequences: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, sequences)]).astype(np.int32)


def rows_of(model: torch.nn.Module, sequence: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
    extra = {} if types is None else {"token_type_ids": torch.from_numpy(types.astype(np.int64))[None]}
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(sequence.astype(np.int64))[None], **extra)
    return out.last_hidden_state[0].float().numpy()


def forward(path: Path, sequences: list[np.ndarray], types: mx.array | None = None) -> list[np.ndarray]:
    model = load_encoder(path)
    rows = model.forward(mx.array(np.concatenate(sequences)), starts(sequences), types)
    return np.split(np.array(rows.astype(mx.float32)), starts(sequences)[1:-1])


@pytest.mark.parametrize("name", MODELS)
def test_ragged_rows_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = torch_model(name)
    model.save_pretrained(tmp_path)
    for got, sequence in zip(forward(tmp_path, prompts()), prompts(), strict=True):
        np.testing.assert_allclose(got, rows_of(model, sequence), atol=5e-5)


@pytest.mark.parametrize("lengths", [(9,), (9, 9, 9), (40, 2)])
def test_one_prompt_and_prompts_of_one_length(lengths: tuple[int, ...], tmp_path: Path) -> None:
    model = torch_model("xlm-roberta")
    model.save_pretrained(tmp_path)
    for got, sequence in zip(forward(tmp_path, prompts(lengths)), prompts(lengths), strict=True):
        np.testing.assert_allclose(got, rows_of(model, sequence), atol=5e-5)


@pytest.mark.parametrize(("name", "lengths"), [("bert", (4200, 300)), ("modernbert", (1100, 700))])
def test_prompts_too_long_for_one_operation(name: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    model = torch_model(name, max_position_embeddings=lengths[0], num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    sequences = prompts(lengths)
    for got, sequence in zip(forward(tmp_path, sequences), sequences, strict=True):
        # float32 has angles of rotations to 1e-4 at these positions, in either library.
        np.testing.assert_allclose(got, rows_of(model, sequence), rtol=1e-4, atol=1e-4)


def test_segments(tmp_path: Path) -> None:
    model = torch_model("bert")
    model.save_pretrained(tmp_path)
    types = [np.arange(length) >= length // 2 for length in LENGTHS]
    joined = mx.array(np.concatenate(types).astype(np.int32))
    for got, sequence, own in zip(forward(tmp_path, prompts(), joined), prompts(), types, strict=True):
        np.testing.assert_allclose(got, rows_of(model, sequence, own), atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpoint_of_pytorch(dtype: torch.dtype, tmp_path: Path) -> None:
    model = torch_model("xlm-roberta")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: array.to(dtype) for name, array in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    rounded = model.to(dtype).float()
    loaded = load_encoder(tmp_path, dtype=mx.float32)
    rows = loaded.forward(mx.array(prompts()[2]), starts(prompts()[2:3]))
    np.testing.assert_allclose(rows, rows_of(rounded, prompts()[2]), atol=5e-5)


def test_old_names_of_norms(tmp_path: Path) -> None:
    model = torch_model("bert")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    renamed = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): array
        for name, array in model.state_dict().items()
    }
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    np.testing.assert_allclose(forward(tmp_path, prompts()[:1])[0], rows_of(model, prompts()[0]), atol=5e-5)


def test_heads_are_kept_and_heads_that_predict_tokens_are_not(tmp_path: Path) -> None:
    config = transformers.XLMRobertaConfig(**SIZES, num_labels=3)
    model = transformers.XLMRobertaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert set(loaded.heads) == {
        f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    }
    np.testing.assert_array_equal(
        loaded.heads["classifier.out_proj.weight"], model.classifier.out_proj.weight.detach()
    )
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(tmp_path)
    assert load_encoder(tmp_path).heads == {}


def test_heads_in_files_of_their_own(tmp_path: Path) -> None:
    torch_model("xlm-roberta").save_pretrained(tmp_path)
    head = torch.nn.Linear(64, 1)
    torch.save(head.state_dict(), tmp_path / "sparse_linear.pt")
    heads = load_encoder(tmp_path).heads
    np.testing.assert_array_equal(heads["sparse_linear.weight"], head.weight.detach())
    np.testing.assert_array_equal(heads["sparse_linear.bias"], head.bias.detach())


def test_quantised_checkpoint(tmp_path: Path) -> None:
    torch_model("xlm-roberta").save_pretrained(tmp_path)
    plain = load_encoder(tmp_path)
    nn.quantize(plain.module, group_size=32, bits=8)
    tensors = dict(tree_flatten(plain.module.parameters()))
    expected = plain.forward(mx.array(prompts()[2]), starts(prompts()[2:3]))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 32, "bits": 8}}))
    loaded = load_encoder(tmp_path)
    np.testing.assert_array_equal(loaded.forward(mx.array(prompts()[2]), starts(prompts()[2:3])), expected)


def test_adapters_of_some_prompts(tmp_path: Path) -> None:
    """A PEFT adapter for one of two prompts gives it the rows of a model with merged weights."""
    model = torch_model("xlm-roberta")
    model.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    name = "encoder.layer.1.attention.self.query"
    a, b = torch.randn(4, 64) / 8, torch.randn(64, 4) / 2
    tensors = {f"base_model.model.roberta.{name}.lora_{part}.weight": t.numpy() for part, t in (("A", a), ("B", b))}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), {k: mx.array(v) for k, v in tensors.items()})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["layer.1.attention.self.query"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    loaded.lora.add(1, loaded.lora.load(adapter, max_rank=4))
    sequences = prompts((7, 12))
    with loaded.lora.applied(np.repeat(np.array([0, 1], np.int32), [7, 12])):
        rows = np.array(loaded.forward(mx.array(np.concatenate(sequences)), starts(sequences)))
    np.testing.assert_allclose(rows[:7], rows_of(model, sequences[0]), atol=5e-5)
    model.get_submodule(name).weight.data += 2.0 * b @ a
    np.testing.assert_allclose(rows[7:], rows_of(model, sequences[1]), atol=5e-5)


def test_positions_that_a_prompt_may_have(tmp_path: Path) -> None:
    for name, longest in (("bert", 128), ("xlm-roberta", 126), ("modernbert", 128)):
        torch_model(name).save_pretrained(tmp_path)
        assert load_encoder(tmp_path).max_length == longest


class Surprise:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


@pytest.mark.parametrize("what", ["code", "old format", "noise", "no tensors"])
def test_pytorch_files_that_are_refused(what: str, tmp_path: Path) -> None:
    torch_model("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    if what == "code":
        torch.save({"weight": Surprise()}, file)
    elif what == "old format":
        torch.save({"weight": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    elif what == "noise":
        file.write_bytes(pickle.dumps([1, 2, 3]))
    else:
        torch.save([torch.zeros(3)], file)
    with pytest.raises(CheckpointError, match="Convert it to safetensors"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit(change: str, tmp_path: Path) -> None:
    model = torch_model("bert")
    model.save_pretrained(tmp_path)
    tensors = dict(mx.load(str(tmp_path / "model.safetensors")))
    name = "encoder.layer.1.attention.self.key.weight"
    array = tensors.pop(name)
    if change == "extra":
        tensors |= {name: array, "encoder.layer.9.output.dense.bias": array}
    elif change == "shape":
        tensors[name] = array[:3]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=r"layer\.9" if change == "extra" else r"self\.key\.weight"):
        load_encoder(tmp_path)


def test_what_is_an_encoder() -> None:
    config = {"model_type": "xlm-roberta", **SIZES}
    assert is_encoder(config | {"architectures": ["XLMRobertaModel"]})
    assert not is_encoder(config | {"architectures": ["XLMRobertaForCausalLM"]})
    assert not is_encoder({"model_type": "llama"})
    supported(config)
    with pytest.raises(MetalModelsError, match="position_embedding_type"):
        supported(config | {"position_embedding_type": "relative_key"})


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnsupportedModelError, match="llama"):
        load_encoder(tmp_path)
