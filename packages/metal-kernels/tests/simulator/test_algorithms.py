"""Common algorithms, right as written: each is accepted and computes what NumPy does."""

import numpy as np
import pytest


@pytest.mark.parametrize(
    "name",
    [
        "transpose",
        "matmul",
        "softmax",
        "scan",
        "histogram",
        "layer_norm",
        "bitonic_sort",
        "convolution",
        "block_matmul",
        "dequantize",
        "embedding",
        "last_block",
    ],
)
def test_algorithm_is_accepted(algorithms, name):
    algorithm = algorithms[name]
    out = algorithm.run(algorithm.source, metal_versions=((3, 2),))
    np.testing.assert_allclose(out, algorithm.expected, rtol=2e-3, atol=2e-3)
