"""Linear layers joined in one matmul."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metal_models.joined_linear import JoinedLinear


def layers_of(bias, bits=None):
    mx.random.seed(0)
    layers = [nn.Linear(64, outputs, bias=bias) for outputs in (64, 32, 96)]
    if bits is not None:
        layers = [nn.QuantizedLinear.from_linear(layer, group_size=32, bits=bits) for layer in layers]
    mx.eval([layer.parameters() for layer in layers])
    return layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_computes_what_the_layers_compute(bias, bits):
    layers = layers_of(bias, bits)
    rows = mx.random.normal((3, 64))
    want = mx.concatenate([layer(rows) for layer in layers], axis=1)
    mx.eval(want)
    joined = JoinedLinear(layers)
    np.testing.assert_allclose(joined(rows), want, rtol=1e-5, atol=1e-5)
    parts = mx.concatenate([layer(rows) for layer in layers], axis=1)
    np.testing.assert_allclose(parts, want, rtol=1e-5, atol=1e-5)


def test_layers_keep_one_copy_of_their_weights():
    layers = [nn.Linear(1024, 1024, bias=False) for _ in range(3)]
    mx.eval([layer.parameters() for layer in layers])
    mx.synchronize()
    before = mx.get_active_memory()
    joined = JoinedLinear(layers)
    mx.synchronize()
    assert mx.get_active_memory() - before < layers[0].weight.nbytes
    del joined


def test_says_what_cannot_be_joined():
    plain, biased = layers_of(False), layers_of(True)
    assert JoinedLinear.joinable(plain)
    assert not JoinedLinear.joinable([plain[0], biased[1]])
    assert not JoinedLinear.joinable([plain[0], *layers_of(False, 4)[1:]])
    assert not JoinedLinear.joinable([nn.Sequential(plain[0])])
