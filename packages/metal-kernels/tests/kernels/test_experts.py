"""Experts on few rows: kernels and twins against float64."""

import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from metal_kernels import kernels, reference
from metal_kernels.kernels.dispatch import FLOAT_DTYPES

TOLERANCE = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def random(rng, *shape, dtype=mx.float32):
    array = mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    mx.eval(array)
    return array


def exact(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def close(found, want, dtype):
    np.testing.assert_allclose(exact(found), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def chosen(rng, tokens, experts, count):
    return mx.array(np.stack([rng.permutation(experts)[:count] for _ in range(tokens)]).astype(np.int32))


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("tokens", "experts", "count", "sizes"),
    [(1, 4, 2, (16, 8)), (3, 5, 2, (264, 40)), (40, 3, 2, (64, 24)), (19, 2, 1, (72, 8))],
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_feed_forward(use, tokens, experts, count, sizes, dtype):
    rng, (hidden, width) = np.random.default_rng(0), sizes
    rows, ids = random(rng, tokens, hidden, dtype=dtype) / hidden**0.5, chosen(rng, tokens, experts, count)
    gate, up = (random(rng, experts, width, hidden, dtype=dtype) for _ in range(2))
    found = kernels.expert_kernel("cuda", dtype, dtype, gate.shape, tokens)
    options = {"variant": found.variant} if use is kernels else {}
    inner = use.expert_silu_and_mul(rows, gate, up, ids, **options)
    assert inner.dtype == dtype
    gates, ups = (np.einsum("tcwh,th->tcw", exact(weight)[np.array(ids)], exact(rows)) for weight in (gate, up))
    close(inner, gates / (1 + np.exp(-gates)) * ups, dtype)

    down, scores = random(rng, experts, hidden, width, dtype=dtype), random(rng, tokens, count)
    out = use.expert_linear(inner, down, ids, scores, **options)
    assert out.dtype == mx.float32
    want = np.einsum("tchw,tcw->tch", exact(down)[np.array(ids)], exact(inner)) * exact(scores)[..., None]
    close(out, want, mx.float32)


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize(("experts", "count"), [(8, 2), (60, 4), (64, 40), (512, 10)])
@pytest.mark.parametrize("normalised", [False, True])
def test_chooses_the_largest(use, experts, count, normalised):
    logits = random(np.random.default_rng(0), 5, experts) * 3
    ids, scores = use.choose_experts(logits, count, normalised=normalised)
    weights = np.exp(exact(logits))
    weights /= weights.sum(axis=1, keepdims=True)
    order = np.argsort(-weights, axis=1)[:, :count]
    want = np.take_along_axis(weights, order, axis=1)
    np.testing.assert_array_equal(np.array(ids), order)
    close(scores, want / want.sum(axis=1, keepdims=True) if normalised else want, mx.float32)


def test_equal_logits_choose_different_experts():
    ids, scores = kernels.choose_experts(mx.zeros((2, 16)), 5, normalised=True)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    np.testing.assert_allclose(scores, 0.2, rtol=1e-6)


def test_says_why_not():
    assert "CPU" in kernels.routing_kernel("cpu", mx.float32, 64).why
    assert "2000 experts" in kernels.routing_kernel("cuda", mx.float32, 2000).why
    shape = (4, 16, 64)
    assert "CPU" in kernels.expert_kernel("cpu", mx.float32, mx.float32, shape, 1).why
    assert "uint32" in kernels.expert_kernel("cuda", mx.float16, mx.uint32, shape, 1).why
    assert "500 rows" in kernels.expert_kernel("cuda", mx.float16, mx.float16, shape, 500).why
    assert "1408 x 2048" in kernels.expert_kernel("cuda", mx.float16, mx.float16, (4, 1408, 2048), 32).why
    assert "15 rows" in kernels.expert_kernel("cuda", mx.float16, mx.float16, (4, 15, 64), 1).why


def test_wrong_shapes_are_refused():
    rows, ids = mx.zeros((3, 16)), mx.zeros((3, 2), mx.int32)
    with pytest.raises(metal_kernels.MetalKernelsError, match="rows of 16 elements"):
        metal_kernels.expert_silu_and_mul(rows, mx.zeros((4, 8, 24)), mx.zeros((4, 8, 24)), ids)
    with pytest.raises(metal_kernels.MetalKernelsError, match="choose 1 to 8 experts"):
        metal_kernels.choose_experts(mx.zeros((3, 8)), 9, normalised=True)
