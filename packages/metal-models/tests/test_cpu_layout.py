"""Weights laid out for the CPU give the same results."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metal_models.cpu_layout import expanded_nbytes, lay_out_for_cpu


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.layers = [nn.Linear(64, 32, bias=True), nn.Linear(32, 64, bias=False)]

    def __call__(self, ids: mx.array) -> mx.array:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.embed.as_linear(hidden)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_same_results_and_the_size_that_was_said(bits: int | None) -> None:
    mx.random.seed(0)
    model = Tiny()
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    ids = mx.array([[1, 5, 90]])
    before = np.array(model(ids))
    assert expanded_nbytes(model) == 4 * (96 * 64 + 2 * 64 * 32)
    assert lay_out_for_cpu(model) == 3
    np.testing.assert_allclose(np.array(model(ids)), before, rtol=1e-4, atol=1e-5)
    assert {type(layer) for layer in model.layers} == {nn.Linear}
    assert model.layers[0].weight.shape == (32, 64)
    assert "bias" in model.layers[0]
    assert "bias" not in model.layers[1]
