"""Experts on few rows: kernels and twins against float64."""

import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from metal_kernels import StackedWeights, kernels, reference
from metal_kernels.kernels import ExpertMatrixVariant
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
    stacked = (lambda weight: weight) if use is kernels else StackedWeights
    inner = use.expert_silu_and_mul(rows, stacked(gate), stacked(up), ids, **options)
    assert inner.dtype == dtype
    gates, ups = (np.einsum("tcwh,th->tcw", exact(weight)[np.array(ids)], exact(rows)) for weight in (gate, up))
    close(inner, gates / (1 + np.exp(-gates)) * ups, dtype)

    down, scores = random(rng, experts, hidden, width, dtype=dtype), random(rng, tokens, count)
    out = use.expert_linear(inner, stacked(down), ids, scores, **options)
    assert out.dtype == mx.float32
    want = np.einsum("tchw,tcw->tch", exact(down)[np.array(ids)], exact(inner)) * exact(scores)[..., None]
    close(out, want, mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "count", "bits", "variant"),
    [
        (3, 5, 2, None, ExpertMatrixVariant(2, 1, 2, 2)),
        (19, 3, 2, None, ExpertMatrixVariant(1, 1, 2, 3)),
        (19, 2, 2, None, ExpertMatrixVariant(1, 2, 4, 1)),
        (5, 4, 3, 4, ExpertMatrixVariant(2, 1, 2, 1)),
        (11, 2, 1, 8, ExpertMatrixVariant(1, 2, 2, 2)),
    ],
    ids=str,
)
def test_on_matrix_units(tokens, experts, count, bits, variant, dtype):
    rng, (hidden, width) = np.random.default_rng(0), (256, 128)
    ids = chosen(rng, tokens, experts, count)
    rows, scores = random(rng, tokens, hidden, dtype=dtype), random(rng, tokens, count)

    def weights(*shape):
        weight = random(rng, experts, *shape, dtype=dtype) / shape[1] ** 0.5
        return StackedWeights(*mx.quantize(weight, 64, bits), bits=bits) if bits else StackedWeights(weight)

    gate, up, down = weights(width, hidden), weights(width, hidden), weights(hidden, width)
    inner = kernels.expert_matrix(rows, gate, up, ids, None, variant)
    assert inner.dtype == dtype
    close(inner, exact(reference.expert_silu_and_mul(rows.astype(mx.float32), gate, up, ids)), dtype)
    out = kernels.expert_matrix(inner.reshape(-1, width), down, None, ids, scores, variant)
    assert out.dtype == mx.float32
    want = exact(reference.expert_linear(inner, down, ids, scores))
    close(out, want, mx.float32 if bits is None else dtype)


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


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("experts", "count", "groups", "kept"), [(16, 3, 1, 1), (60, 4, 6, 2), (256, 8, 8, 4), (40, 2, 40, 5)]
)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_chooses_of_the_best_groups(use, experts, count, groups, kept, sigmoid):
    rng = np.random.default_rng(0)
    logits, bias = random(rng, 5, experts), random(rng, experts) if sigmoid and groups < experts else None
    options = {"sigmoid_bias": bias, "groups": groups, "kept_groups": kept, "scale": 2.5, "normalised": sigmoid}
    ids, scores = use.choose_experts(logits, count, **options)
    weights = np.exp(exact(logits))
    weights = weights / weights.sum(axis=1, keepdims=True) if bias is None else weights / (1 + weights)
    ranked = weights if bias is None else weights + exact(bias)
    of_group = np.sort(ranked.reshape(5, groups, -1), axis=2)[..., -1 if bias is None else -2 :].sum(axis=2)
    in_group = np.argsort(np.argsort(-of_group, axis=1), axis=1).repeat(experts // groups, axis=1) < kept
    order = np.argsort(-np.where(in_group, ranked, 0), axis=1)[:, :count]
    want = np.take_along_axis(weights, order, axis=1)
    want = want / want.sum(axis=1, keepdims=True) if sigmoid else want
    np.testing.assert_array_equal(np.array(ids), order)
    close(scores, want * 2.5, mx.float32)


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
    assert "1408 x 2048" in kernels.expert_kernel("metal", mx.float16, mx.float16, (4, 1408, 2048), 32).why
    assert "15 rows" in kernels.expert_kernel("cuda", mx.float16, mx.float16, (4, 15, 64), 1).why


@pytest.mark.parametrize(
    ("shape", "tokens", "chosen", "gated", "want"),
    [
        ((64, 1408, 2048), 32, 6, True, ExpertMatrixVariant(2, 1, 8, 4)),
        ((64, 2048, 1408), 32, 6, False, ExpertMatrixVariant(4, 1, 8, 2)),
        ((8, 1408, 256), 32, 2, True, ExpertMatrixVariant(2, 2, 8, 1)),
        ((4, 48, 512), 64, 3, False, ExpertMatrixVariant(1, 4, 8, 2)),
    ],
)
def test_layouts_on_matrix_units(shape, tokens, chosen, gated, want):
    weights = StackedWeights(mx.zeros(shape, mx.bfloat16))
    found = kernels.expert_matrix_kernel("cuda", mx.bfloat16, weights, tokens, chosen, gated=gated)
    assert found.variant == want


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target": "cpu"}, "target is cpu"),
        ({"target": "metal"}, "target is metal"),
        ({"dtype": mx.float32}, "float32"),
        ({"dtype": mx.float16}, "the weights are"),
        ({"weights": StackedWeights(mx.zeros((4, 64, 8), mx.uint32), bits=2)}, "codes of 2 bits"),
        ({"weights": StackedWeights(mx.zeros((4, 24, 64), mx.bfloat16))}, "24 x 64 weights"),
        ({"tokens": 65}, "65 rows"),
        ({"tokens": 16}, "16 rows"),
    ],
    ids=str,
)
def test_says_why_not_on_matrix_units(change, why):
    given = {
        "target": "cuda",
        "dtype": mx.bfloat16,
        "weights": StackedWeights(mx.zeros((4, 64, 64), mx.bfloat16)),
        "tokens": 32,
        "chosen": 2,
        "gated": True,
    }
    assert isinstance(kernels.expert_matrix_kernel(**given), kernels.Accepted)
    assert why in kernels.expert_matrix_kernel(**given | change).why


def test_wrong_shapes_are_refused():
    rows, ids = mx.zeros((3, 16)), mx.zeros((3, 2), mx.int32)
    weights = StackedWeights(mx.zeros((4, 8, 24)))
    with pytest.raises(metal_kernels.MetalKernelsError, match="rows of 16 elements"):
        metal_kernels.expert_silu_and_mul(rows, weights, weights, ids)
    with pytest.raises(metal_kernels.MetalKernelsError, match="choose 1 to 8 experts"):
        metal_kernels.choose_experts(mx.zeros((3, 8)), 9, normalised=True)
    with pytest.raises(metal_kernels.MetalKernelsError, match="equal groups of 8 experts"):
        metal_kernels.choose_experts(mx.zeros((3, 8)), 2, normalised=True, groups=3)
