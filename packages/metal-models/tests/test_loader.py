"""Loading safetensors directories, and what is said when they do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metal_models import CheckpointError, MetalModelsError, PagedModel, UnsupportedModelError, load

Weights = dict[str, mx.array]


def save(directory: Path, config: dict[str, Any], weights: Weights) -> Path:
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def model(tiny: Callable[..., PagedModel]) -> PagedModel:
    return tiny("llama")


@pytest.fixture
def weights(model: PagedModel) -> Weights:
    return dict(tree_flatten(model.module.parameters()))


def logits(model: PagedModel) -> np.ndarray:
    return np.array(model.module(mx.array([[1, 2, 3]])).astype(mx.float32))


def test_loads_what_was_saved(tmp_path: Path, model: PagedModel, weights: Weights) -> None:
    loaded = load(save(tmp_path, model.config, weights))
    assert loaded.config == model.config
    assert loaded.nbytes == model.nbytes
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_loads_quantised_weights(tmp_path: Path, tiny: Callable[..., PagedModel]) -> None:
    model = tiny("qwen3", bits=4)
    config = model.config | {"quantization": {"group_size": 32, "bits": 4}}
    loaded = load(save(tmp_path, config, dict(tree_flatten(model.module.parameters()))))
    assert loaded.nbytes == model.nbytes
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_expands_quantised_weights_that_fit(tmp_path: Path, tiny: Callable[..., PagedModel]) -> None:
    model = tiny("qwen3", bits=4)
    config = model.config | {"quantization": {"group_size": 32, "bits": 4}}
    path = save(tmp_path, config, dict(tree_flatten(model.module.parameters())))
    expanded = load(path, expand_to_bytes=1 << 30)
    assert expanded.nbytes > 4 * model.nbytes
    assert load(path, expand_to_bytes=expanded.nbytes).nbytes == expanded.nbytes
    assert load(path, expand_to_bytes=expanded.nbytes - 1).nbytes == model.nbytes
    np.testing.assert_allclose(logits(expanded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_dtype_override_reaches_weights_rows_and_cache(
    tmp_path: Path, model: PagedModel, weights: Weights, dtype: mx.Dtype
) -> None:
    loaded = load(save(tmp_path, model.config, weights), dtype=dtype)
    assert loaded.dtype == dtype
    assert loaded.nbytes == model.nbytes // 2
    assert {spec.page_dtype for spec in loaded.kv_cache_specs(16).values()} == {dtype}


def test_missing_tensor_is_named(tmp_path: Path, model: PagedModel, weights: Weights) -> None:
    del weights["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match=r"Missing 1 parameters.*model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(save(tmp_path, model.config, weights))


def test_extra_tensor_is_named(tmp_path: Path, model: PagedModel, weights: Weights) -> None:
    weights["model.layers.0.surplus.weight"] = mx.ones((2, 2))
    with pytest.raises(CheckpointError, match=r"not in model.*model\.layers\.0\.surplus\.weight"):
        load(save(tmp_path, model.config, weights))


def test_misshapen_tensor_is_named(tmp_path: Path, model: PagedModel, weights: Weights) -> None:
    weights["model.norm.weight"] = mx.ones((3,))
    with pytest.raises(CheckpointError, match=r"shape.*model\.norm\.weight"):
        load(save(tmp_path, model.config, weights))


def test_damaged_file_is_named(tmp_path: Path, model: PagedModel, weights: Weights) -> None:
    file = save(tmp_path, model.config, weights) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        load(tmp_path)


def test_unsupported_architecture_is_known_before_weights_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(UnsupportedModelError, match="no_such_architecture"):
        load(tmp_path)


def test_code_of_the_models_own_is_not_run(tmp_path: Path, model: PagedModel, weights: Weights) -> None:
    with pytest.raises(MetalModelsError, match="which is not run"):
        load(save(tmp_path, model.config | {"model_file": "model.py"}, weights))
