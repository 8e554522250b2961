"""Per-head projections give the same for rows together as for each row alone."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear

from metal_models import PagedModel
from metal_models.row_projections import PENDING, multiply_rows_together


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = [MultiLinear(32, 64, 3), MultiLinear(64, 32, 3)]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("transpose", [True, False])
def test_rows_together_equal_rows_alone(bits: int | None, transpose: bool) -> None:
    model = Two()
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    x = mx.random.normal((5, 3, 1, 32 if transpose else 64))
    alone = mx.concatenate([model.inner[0](row[None], transpose=transpose) for row in x])
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert multiply_rows_together(model) == 2
    together = model.inner[0](x, transpose=transpose)
    np.testing.assert_allclose(np.array(together), np.array(alone), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in tree_flatten(model.parameters())] == names


def test_a_second_time_finds_nothing_left() -> None:
    model = Two()
    assert [multiply_rows_together(model), multiply_rows_together(model)] == [2, 0]


def test_arrays_are_shared(tiny: Callable[..., PagedModel]) -> None:
    model = Two()
    weight = model.inner[0].weight
    multiply_rows_together(model)
    assert model.inner[0].weight is weight
    assert tiny("deepseek_v3").module.model.layers[0].self_attn.embed_q.weight.shape == (4, 32, 32)


def test_attention_takes_a_layers_products(tiny: Callable[..., PagedModel]) -> None:
    layer = tiny("deepseek_v3").module.model.layers[0].self_attn
    query, latent = mx.random.normal((5, 4, 1, 32)), mx.random.normal((5, 4, 1, 32))
    absorbed, values = layer.embed_q(query), layer.unembed_out(latent)
    PENDING.ask()
    assert layer.embed_q(query) is query
    taken = PENDING.take()
    assert taken is not None
    np.testing.assert_array_equal(np.array(taken.absorb(query[:, :, 0])), np.array(absorbed[:, :, 0]))
    np.testing.assert_array_equal(np.array(taken.unabsorb(latent[:, :, 0])), np.array(values[:, :, 0]))
    keys, expanded = taken.expand(latent[:, 0, 0])
    assert (keys.shape, expanded.shape) == ((4, 5, 32), (4, 5, taken.value_size))
    assert layer.unembed_out(latent) is latent
    assert layer.unembed_out(latent) is not latent
    assert layer.embed_q(query) is not query
    assert PENDING.take() is None


def test_what_was_asked_ends_with_the_step(tiny: Callable[..., PagedModel]) -> None:
    layer = tiny("deepseek_v3").module.model.layers[0].self_attn
    query = mx.random.normal((5, 4, 1, 32))
    PENDING.ask()
    PENDING.drop()
    assert layer.embed_q(query) is not query


def test_modules_of_other_orders_keep_their_products() -> None:
    model = Two()
    multiply_rows_together(model)
    x = mx.random.normal((5, 3, 1, 32))
    PENDING.ask()
    assert model.inner[0](x).shape == (5, 3, 1, 64)
    PENDING.drop()
