"""Layers and head, run apart, are the model."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from metal_models import MetalModelsError, PagedModel
from metal_models.head_split import HeadSplit

# One per way of making logits: separate head, tied, scaled, soft-capped, wrapped twice, applied by the backbone.
FAMILIES = [
    "llama",
    "cohere",
    "gemma2",
    "granite",
    "gemma3",
    "qwen3_vl",
    "gpt_neox",
    "gemma3n",
    "phixtral",
    "nanochat",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_give_the_whole_models_logits(family: str, tiny: Callable[..., PagedModel]) -> None:
    module = tiny(family).module
    ids = mx.array([[5], [9], [17]])
    split = HeadSplit(module)
    hidden = split.hidden(ids, make_prompt_cache(module))
    whole = module(ids, cache=make_prompt_cache(module))
    assert hidden.shape[:2] == (3, 1)
    np.testing.assert_allclose(np.array(split.logits(hidden)), np.array(whole), rtol=1e-5, atol=1e-6)


def test_head_runs_on_the_rows_it_is_given(tiny: Callable[..., PagedModel]) -> None:
    split = HeadSplit(tiny("llama").module)
    rows = mx.random.normal((4, 1, 64), key=mx.random.key(1))
    np.testing.assert_allclose(np.array(split.logits(rows[2:])), np.array(split.logits(rows))[2:], rtol=1e-5)


def test_a_model_without_a_known_backbone_is_refused() -> None:
    with pytest.raises(MetalModelsError, match="expected a backbone named"):
        HeadSplit(nn.Linear(2, 2))
