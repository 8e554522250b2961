"""Checkpoints without a vocabulary head, with a score head, or named from the backbone on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metal_models import CheckpointError, PagedModel, load

Weights = dict[str, mx.array]
IDS = mx.array([[1, 2, 3, 7]])


def save(directory: Path, config: dict[str, Any], weights: Weights) -> Path:
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def weights_of(model: PagedModel) -> Weights:
    return dict(tree_flatten(model.module.parameters()))


def backbone_rows(model: PagedModel) -> np.ndarray:
    return np.array(model.module.model(IDS))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(tiny: Callable[..., PagedModel], tmp_path: Path, request: pytest.FixtureRequest) -> PagedModel:
    """A qwen3 with and without a head of its own."""
    config = tiny("qwen3").config | {"tie_word_embeddings": request.param}
    weights = weights_of(tiny("qwen3"))
    weights.pop("lm_head.weight", None)
    if not request.param:
        weights["lm_head.weight"] = mx.random.normal((config["vocab_size"], config["hidden_size"]))
    directory = tmp_path / "whole"
    directory.mkdir()
    return load(save(directory, config, weights))


def test_backbone_alone(tmp_path: Path, model: PagedModel) -> None:
    weights = {
        name.removeprefix("model."): array for name, array in weights_of(model).items() if not name.startswith("lm_")
    }
    loaded = load(save(tmp_path, model.config, weights), pooling=True)
    np.testing.assert_array_equal(backbone_rows(loaded), backbone_rows(model))
    with pytest.raises(CheckpointError):
        load(tmp_path)


def test_score_head(tmp_path: Path, model: PagedModel) -> None:
    weights = {name: array for name, array in weights_of(model).items() if not name.startswith("lm_head")}
    score = mx.random.normal((3, model.hidden_size))
    loaded = load(save(tmp_path, model.config, weights | {"score.weight": score}), pooling=True)
    np.testing.assert_array_equal(backbone_rows(loaded), backbone_rows(model))
    np.testing.assert_array_equal(loaded.module.score.weight, score)


def test_generating_checkpoint_is_as_before(tmp_path: Path, model: PagedModel) -> None:
    loaded = load(save(tmp_path, model.config, weights_of(model)), pooling=True)
    np.testing.assert_array_equal(loaded.module(IDS), model.module(IDS))


def test_missing_tensor_is_still_an_error(tmp_path: Path, model: PagedModel) -> None:
    weights = weights_of(model)
    del weights["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match="q_proj"):
        load(save(tmp_path, model.config, weights), pooling=True)


def test_head_rows_give_the_logits(model: PagedModel) -> None:
    hidden = mx.random.normal((5, model.hidden_size))
    ids = mx.array([3, 11])
    expected = model.compute_logits(hidden)[:, ids]
    np.testing.assert_allclose(hidden @ model.head_rows(ids).T, expected, rtol=1e-4, atol=1e-4)


def test_head_rows_of_quantised_weights(tiny: Callable[..., PagedModel]) -> None:
    model = tiny("qwen3", bits=4)
    hidden = mx.random.normal((2, model.hidden_size))
    expected = model.compute_logits(hidden)[:, 5:6]
    np.testing.assert_allclose(hidden @ model.head_rows(mx.array([5])).T, expected, rtol=1e-3, atol=1e-3)
