"""Linear layers with what is around them, against their twin."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from metal_kernels import LinearWeights, StackedWeights, kernels, reference
from metal_kernels.kernels import Accepted, LinearVariant, Rejected, linear_kernel

TOLERANCE = {mx.float16: 4e-3, mx.bfloat16: 3e-2}


def array(rng, *shape, dtype=mx.bfloat16):
    return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)


def weights_of(rng, outputs, inputs, dtype=mx.bfloat16, bits=None, bias=False):
    weight = array(rng, outputs, inputs, dtype=mx.float32) * inputs**-0.5
    more = {"bias": array(rng, outputs, dtype=dtype)} if bias else {}
    if bits is None:
        return LinearWeights(weight.astype(dtype), **more)
    return LinearWeights(*mx.quantize(weight.astype(dtype), group_size=64, bits=bits), **more, bits=bits)


def check(rows, weights, variant, **options):
    """Compare with the twin in float32 on the same numbers: it then has no rounding of its own."""
    got = kernels.fused_linear(rows, weights, variant, **options)
    assert got.dtype == rows.dtype
    arrays = ("weight", "scales", "biases", "bias")[0 if weights.bits is None else 1 :]
    exact = {name: exactly(getattr(weights, name)) for name in arrays}
    options = {name: exactly(value) for name, value in options.items()}
    want = reference.fused_linear(exactly(rows), replace(weights, **exact), **options)
    tolerance = TOLERANCE[rows.dtype]
    np.testing.assert_allclose(exactly(got), want, rtol=tolerance, atol=tolerance)


def exactly(value):
    return value.astype(mx.float32) if isinstance(value, mx.array) else value


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "variant"),
    [(1, LinearVariant(1, 1, 2, 1)), (8, LinearVariant(2, 1, 2, 4)), (19, LinearVariant(1, 4, 4, 2))],
    ids=str,
)
def test_plain(rows, variant, dtype):
    rng = np.random.default_rng(0)
    check(array(rng, rows, 160, dtype=dtype), weights_of(rng, 64, 160, dtype), variant)


@pytest.mark.parametrize("tiles", [2, 3])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_norm_and_gate(bits, tiles):
    rng = np.random.default_rng(1)
    weights = weights_of(rng, 32 * tiles, 256, bits=bits)
    check(array(rng, 5, 256) * 3, weights, LinearVariant(tiles, 1, 2, 2), norm=array(rng, 256), eps=1e-3, gated=True)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_bias_and_residual(bits):
    rng = np.random.default_rng(2)
    weights = weights_of(rng, 48, 384, bits=bits, bias=True)
    check(array(rng, 11, 384), weights, LinearVariant(1, 2, 2, 2), residual=array(rng, 11, 48))


def test_rows_that_are_a_view():
    rng = np.random.default_rng(3)
    check(array(rng, 6, 64)[::2], weights_of(rng, 32, 64), LinearVariant(2, 1, 2, 1))


def test_rows_that_are_wider():
    rng = np.random.default_rng(4)
    rows, weights = array(rng, 5, 160), weights_of(rng, 32, 128)
    check(rows, weights, LinearVariant(1, 1, 2, 1), norm=array(rng, 128), eps=1e-3)


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    ("tokens", "heads", "outputs", "variant"),
    [(3, 3, 64, LinearVariant(2, 1, 2, 1)), (11, 2, 16, LinearVariant(1, 2, 4, 2))],
)
def test_heads(use, bits, tokens, heads, outputs, variant):
    rng, inputs, dtype = np.random.default_rng(5), 128, mx.bfloat16 if use is kernels else mx.float32
    rows = array(rng, tokens, heads, inputs + 32, dtype=dtype)
    weight = array(rng, heads, outputs, inputs, dtype=dtype) * inputs**-0.5
    weights = StackedWeights(weight) if bits is None else StackedWeights(*mx.quantize(weight, 64, bits), bits=bits)
    got = use.head_linear(rows, weights, **({"variant": variant} if use is kernels else {}))
    assert got.shape == (tokens, heads, outputs)
    weight = weight if bits is None else mx.dequantize(*weights.arrays, group_size=64, bits=bits)
    parts = [np.array(exactly(value)).astype(np.float64) for value in (rows[..., :inputs], weight)]
    np.testing.assert_allclose(exactly(got), np.einsum("thi,hoi->tho", *parts), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("shape", "tiles", "simdgroups"), [((16, 512, 128), 4, 4), ((16, 128, 512), 1, 8), ((128, 128, 512), 4, 8)]
)
def test_layouts_of_heads(shape, tiles, simdgroups):
    found = kernels.head_linear_kernel("cuda", mx.bfloat16, StackedWeights(mx.zeros(shape, mx.bfloat16)), 32)
    assert (found.variant.tiles, found.variant.simdgroups) == (tiles, simdgroups)
    assert "float32" in kernels.head_linear_kernel("cuda", mx.float32, StackedWeights(mx.zeros(shape)), 32).why


def test_wrong_shapes_are_refused():
    with pytest.raises(metal_kernels.MetalKernelsError, match="at least 64 elements"):
        metal_kernels.fused_linear(mx.zeros((3, 32)), LinearWeights(mx.zeros((16, 64))))
    with pytest.raises(metal_kernels.MetalKernelsError, match=r"\(3, 4, 64\)"):
        metal_kernels.head_linear(mx.zeros((3, 2, 64)), StackedWeights(mx.zeros((4, 16, 64))))


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "gated", "tiles", "simdgroups"),
    [
        (32, 4096, 1024, False, 2, 8),
        (32, 6144, 1024, True, 3, 8),
        (32, 16384, 2048, True, 4, 8),
        (8, 16384, 2048, True, 2, 8),
        (32, 2048, 8192, False, 2, 16),
        (1, 1024, 3072, False, 1, 16),
    ],
)
def test_layouts_fill_the_device(rows, outputs, inputs, gated, tiles, simdgroups):
    linear = linear_kernel(
        "cuda", mx.bfloat16, LinearWeights(mx.zeros((outputs, inputs), mx.bfloat16)), rows, gated=gated
    )
    assert isinstance(linear, Accepted)
    assert (linear.variant.tiles, linear.variant.simdgroups) == (tiles, simdgroups)
    assert outputs % (16 * tiles) == 0
    assert simdgroups < 16 or rows < 32 or linear.variant.depth <= 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target": "cpu"}, "target is cpu"),
        ({"target": "metal"}, "target is metal"),
        ({"dtype": mx.float32}, "float32"),
        ({"rows": 33}, "33 rows"),
        ({"normed": True, "dtype": mx.float16}, "float16"),
        ({"weights": LinearWeights(mx.zeros((64, 64), mx.float16))}, "weight is"),
        ({"weights": LinearWeights(mx.zeros((64, 40), mx.bfloat16))}, "64 x 40 weights"),
        ({"weights": LinearWeights(mx.zeros((48, 64), mx.bfloat16)), "gated": True}, "48 x 64 weights"),
        ({"weights": LinearWeights(mx.zeros((64, 8), mx.uint32), bits=2)}, "codes of 2 bits"),
    ],
)
def test_says_what_it_does_not_take(change, why):
    given = {
        "target": "cuda",
        "dtype": mx.bfloat16,
        "weights": LinearWeights(mx.zeros((64, 64), mx.bfloat16)),
        "rows": 4,
    }
    answer = linear_kernel(**given | change)
    assert isinstance(answer, Rejected)
    assert why in answer.why
