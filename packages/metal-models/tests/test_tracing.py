"""What a model asks of its caches is seen by running it, not by reading its config."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from metal_models import PagedModel, UnsupportedModelError
from metal_models.attention_layer import AttentionLayer
from metal_models.head_split import HeadSplit
from metal_models.layer import Layer
from metal_models.tracing import trace


def traced(model: nn.Module) -> list[Layer]:
    return list(trace(model, HeadSplit(model), "some_type").layers.values())


def test_shapes_dtype_and_windows(tiny: Callable[..., PagedModel]) -> None:
    module = tiny("gpt_oss").module
    module.set_dtype(mx.float16)
    full = AttentionLayer(2, 16, 16, mx.float16, None)
    sliding = replace(full, window=8, kept=8)
    assert traced(module) == [sliding, full] * 2


def test_a_layer_read_with_two_windows_keeps_the_wider_one(tiny: Callable[..., PagedModel]) -> None:
    layers = traced(tiny("iquestloopcoder").module)
    assert [isinstance(layer, AttentionLayer) and layer.window for layer in layers] == [None] * 4 + [64] * 4


def test_nothing_is_computed(tiny: Callable[..., PagedModel]) -> None:
    module = tiny("llama").module
    module.model.embed_tokens.weight = mx.full((128, 64), float("nan"))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    traced(module)
    assert mx.get_peak_memory() - before < 10_000


class Odd(nn.Module):
    """A one-layer model around some attention."""

    def __init__(self, cache: object, attention: Callable[..., mx.array]) -> None:
        super().__init__()
        self.cache, self.attention = [cache], attention
        self.model = Backbone(attention)

    @property
    def layers(self) -> list[None]:
        return [None]

    def make_cache(self) -> list[object]:
        return self.cache

    def __call__(self, inputs: mx.array, cache: list[object] | None = None) -> mx.array:
        return self.model(inputs, cache)


class Backbone(nn.Module):
    def __init__(self, attention: Callable[..., mx.array]) -> None:
        super().__init__()
        self.attention = attention

    def __call__(self, inputs: mx.array, cache: list[object]) -> mx.array:
        rows = mx.zeros((*inputs.shape, 8))[:, None]
        return self.attention(rows, cache[0])[:, 0]


def twice(rows: mx.array, cache: KVCache) -> mx.array:
    cache.update_and_fetch(rows, rows)
    return cache.update_and_fetch(rows, rows)[0]


def alone(rows: mx.array, cache: KVCache) -> mx.array:
    keys, values = cache.update_and_fetch(rows, rows)
    return mx.fast.scaled_dot_product_attention(rows, keys, values, scale=1.0)


def never(rows: mx.array, cache: KVCache) -> mx.array:
    return rows


@pytest.mark.parametrize(
    ("cache", "attention", "reason"),
    [
        (KVCache(), twice, "more than once"),
        (KVCache(), alone, "code of its own"),
        (KVCache(), never, "no layer stores"),
        (RotatingKVCache(8, keep=4), alone, "keeps its first 4 tokens"),
        (object(), alone, "cache of its own kind"),
    ],
)
def test_refusals(cache: object, attention: Callable[..., mx.array], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'some_type'.*{reason}"):
        traced(Odd(cache, attention))
