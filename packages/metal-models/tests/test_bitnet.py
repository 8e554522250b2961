"""Ternary weights multiply as the packed layout of mlx-lm's kernel says."""

import mlx.core as mx
import numpy as np
import pytest

from metal_models.adapters.bitnet import BitLinear


@pytest.mark.parametrize("invert", [True, False])
def test_against_unpacked_weights(invert: bool) -> None:
    rng = np.random.default_rng(0)
    ternary = rng.integers(-1, 2, (12, 8))
    layer = BitLinear(8, 12, bias=True, invert_weight_scales=invert)
    # Row r of the packed weight holds rows r, r + 3, r + 6 and r + 9, from the lowest bits up.
    packed = sum((ternary[quarter * 3 : quarter * 3 + 3] + 1) << (2 * quarter) for quarter in range(4))
    layer.weight, layer.weight_scale = mx.array(packed.astype(np.uint8)), mx.array([0.5])
    layer.bias = mx.array(rng.normal(size=12), mx.float32)
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    expected = x @ ternary.T * (2.0 if invert else 0.5) + np.array(layer.bias)
    np.testing.assert_allclose(np.array(layer(mx.array(x))), expected, rtol=1e-5, atol=1e-5)
