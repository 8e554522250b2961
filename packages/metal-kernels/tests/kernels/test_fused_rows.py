"""Norms and activations between matmuls, against their twins."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import kernels, reference
from metal_kernels.kernels.dispatch import FLOAT_DTYPES

TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}


def rows(rng, *shape, dtype=mx.float32):
    return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)


def close(got, want):
    assert got.dtype == want.dtype
    tolerance = TOLERANCE[want.dtype]
    as_numpy = [np.array(a.astype(mx.float32)) for a in (got, want)]
    np.testing.assert_allclose(*as_numpy, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (3, 132), (2, 1024), (1, 1540)], ids=str)
def test_add_rms_norm(shape, dtype):
    rng = np.random.default_rng(0)
    arrays = rows(rng, *shape, dtype=dtype), rows(rng, *shape, dtype=dtype), rows(rng, shape[1], dtype=dtype)
    for got, want in zip(kernels.add_rms_norm(*arrays, 1e-6), reference.add_rms_norm(*arrays, 1e-6), strict=True):
        close(got, want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_add_rms_norm_of_parts(dtype):
    rng = np.random.default_rng(0)
    arrays = rows(rng, 3, 5, 132), rows(rng, 3, 132, dtype=dtype), rows(rng, 132, dtype=dtype)
    for got, want in zip(kernels.add_rms_norm(*arrays, 1e-6), reference.add_rms_norm(*arrays, 1e-6), strict=True):
        assert want.dtype == dtype
        close(got, want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("parts", [(), (5,)], ids=str)
def test_add_rms_norm_of_rows_beside(dtype, parts):
    rng = np.random.default_rng(0)
    arrays = rows(rng, 3, *parts, 132), rows(rng, 3, 132, dtype=dtype), rows(rng, 132, dtype=dtype)
    beside = rows(rng, 3, 132, dtype=dtype)
    found, expected = (where.add_rms_norm(*arrays, 1e-6, beside) for where in (kernels, reference))
    for got, want in zip(found, expected, strict=True):
        assert want.dtype == dtype
        close(got, want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 264), (2, 2056)], ids=str)
def test_silu_and_mul(shape, dtype):
    gate_up = rows(np.random.default_rng(0), *shape, dtype=dtype) * 4
    close(kernels.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


def test_rows_that_are_a_view():
    gate_up = rows(np.random.default_rng(0), 4, 64)[::2]
    close(kernels.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))
