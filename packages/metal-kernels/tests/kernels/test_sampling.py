"""Sampling: kernels and twins against float64."""

import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from metal_kernels import kernels, pack_sampling_rules, reference
from metal_kernels.kernels import SampleVariant

RULES = [  # temperature, min_p, top_k, top_p
    (0.0, 0.0, 0, 1.0),
    (1.0, 0.0, 0, 1.0),
    (0.7, 0.0, 0, 1.0),
    (1.0, 0.1, 0, 1.0),
    (1.3, 0.0, 5, 1.0),
    (1.0, 0.0, 1, 1.0),
    (1.0, 0.0, 70, 1.0),
    (0.7, 0.0, 0, 0.9),
    (2.0, 0.0, 0, 0.3),
    (1.0, 0.02, 20, 0.95),
    (0.01, 0.0, 0, 0.5),
    (1.0, 1.0, 0, 1.0),
]


def sample(use, logits, uniform, rules, threads=32):
    numbers = mx.array(np.pad(np.array(uniform, np.float32), (0, 8)))
    columns = zip(*rules, strict=True)
    dtypes = (np.float32, np.float32, np.int32, np.float32)
    packed = mx.array(pack_sampling_rules(*(np.array(c, t) for c, t in zip(columns, dtypes, strict=True))))
    options = {"variant": SampleVariant(threads)} if use is kernels else {}
    return use.sample_rows(logits, numbers, packed, **options).tolist()


def exact_rows(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def kept(row, min_p, top_k, top_p):
    """Distances in ``row`` order that stay, ties together."""
    keep = row <= (-np.log2(min_p) if min_p else np.inf)
    if 0 < top_k < len(row):
        keep &= row <= np.sort(row)[top_k - 1]
    if top_p < 1:
        weight = np.where(keep, np.exp2(-row), 0)
        order = np.argsort(row, kind="stable")
        running = np.cumsum(weight[order])
        keep &= row <= row[order][min(np.sum(running < top_p * running[-1]), len(row) - 1)]
    return keep


def require_drawn(row, token, uniform, rule):
    """Require that the running sum of weights passes the uniform number with the token."""
    temperature, *rest = rule
    if temperature == 0:
        assert token == int(np.argmax(row))
        return
    scale = np.float32(1.4426950408889634 / np.float32(temperature))
    distance = ((row.max() - row).astype(np.float32) * scale).astype(np.float64)
    keep = kept(distance, *rest)
    assert keep[token]
    running = np.cumsum(np.where(keep, np.exp2(-distance), 0))
    share = running / running[-1]
    assert share[token] >= uniform - 1e-6
    assert (share[token - 1] if token else 0) <= uniform + 1e-6


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("vocab", "spread", "dtype"), [(264, 3.0, mx.bfloat16), (99, 8.0, mx.float32), (72, 0.5, mx.float16)], ids=str
)
def test_every_rule(use, vocab, spread, dtype):
    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(size=(len(RULES), vocab)).astype(np.float32) * spread).astype(dtype)
    uniform = rng.uniform(size=len(RULES)).astype(np.float32)
    tokens = sample(use, logits, uniform, RULES)
    for row, token, number, rule in zip(exact_rows(logits), tokens, uniform, RULES, strict=True):
        require_drawn(row, token, number, rule)


@pytest.mark.parametrize("threads", [256, 512])
def test_as_many_threads_as_dispatch_takes(threads):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(1, 9000)).astype(np.float32) * 2
    logits, uniform, rule = mx.array(rows).astype(mx.bfloat16), [np.float32(0.4)], (0.9, 0.0, 50, 0.9)
    (token,) = sample(kernels, logits, uniform, [rule], threads=threads)
    require_drawn(exact_rows(logits)[0], token, uniform[0], rule)


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
def test_ends_of_the_draw(use):
    logits = mx.array([[0.0] * 9 + [1.0, -mx.inf]] * 2)
    assert sample(use, logits, [0.0, 1 - 2**-24], [RULES[1]] * 2) == [0, 9]


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
def test_equal_logits_stay_together(use):
    uniform = (np.arange(10) + 0.5) / 10
    logits = mx.array([[2.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0]] * 10)
    assert set(sample(use, logits, uniform, [(1.0, 0.0, 2, 1.0)] * 10)) == {0, 1, 2, 3, 4}
    assert set(sample(use, logits, uniform, [(100.0, 0.0, 0, 0.2)] * 10)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize("value", [0.0, -3.5e8, -mx.inf])
def test_rows_of_one_value(use, value):
    rules = [(1.0, 0.0, 3, 0.4), (1.0, 0.5, 0, 1.0), (0.0, 0.0, 0, 1.0), (1.0, 0.0, 0, 0.5)]
    tokens = sample(use, mx.full((4, 16), value), [0.5, 0.01, 0.9, 0.99], rules)
    assert tokens == ([15, 15, 0, 15] if np.isinf(value) else [8, 0, 0, 15])


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
def test_forbidden_tokens_are_not_drawn(use):
    logits = np.full((6, 100), -np.inf, np.float32)
    logits[:, 40:44] = [1.0, 3.0, -200.0, 2.0]
    rules = [(1.0, 0.0, 50, 1.0), (1.0, 0.0, 0, 0.999), (1.0, 0.001, 50, 0.99)] * 2
    assert set(sample(use, mx.array(logits), [0.0, 0.001, 0.5, 0.8, 0.95, 0.999], rules)) <= {40, 41, 43}


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
def test_tokens_that_almost_tie(use):
    rng = np.random.default_rng(1)
    rows = 5.0 + rng.integers(0, 400, (4, 96)).astype(np.float32) * 2.0**-21
    rules = [(1.0, 0.0, 17, 1.0), (0.5, 0.0, 70, 0.5), (1.0, 0.0, 0, 0.123), (1.0, 0.0, 95, 1.0)]
    uniform = rng.uniform(size=4).astype(np.float32)
    tokens = sample(use, mx.array(rows), uniform, rules)
    for row, token, number, rule in zip(rows.astype(np.float64), tokens, uniform, rules, strict=True):
        require_drawn(row, token, number, rule)


@pytest.mark.parametrize("use", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("vocab", "which", "dtype"),
    [
        (8, "both", mx.float32),
        (75, "both", mx.float16),
        (264, "penalties", mx.bfloat16),
        (264, "bitmask", mx.float32),
        (2088, "both", mx.bfloat16),
    ],
    ids=str,
)
def test_adjust_logits(use, vocab, which, dtype):
    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(size=(5, vocab)).astype(np.float32) * 4).astype(dtype)
    history = rng.integers(0, 4, (3, vocab)) / 2.0
    penalties = np.zeros((5, 8), np.float32)
    penalties[:, :4] = [[2, 1.5, 0, 0], [-1, 2, 1, 1], [0, 0.5, 0.25, 0], [1, 1, 0, 2], [2, 1.25, -1, 0.5]]
    bitmask = rng.integers(-(2**31), 2**31, (5, -(-vocab // 32) + 8)).astype(np.int32)
    given, want = {}, exact_rows(logits)
    if which != "bitmask":
        given = {"history": mx.array(history.astype(np.float32)), "penalties": mx.array(penalties)}
        for row, (slot, repetition, frequency, presence) in zip(want, penalties[:, :4], strict=True):
            past = history[int(slot)] if slot >= 0 else np.zeros(vocab)
            scale, times = np.where(past > 0, repetition, 1), np.floor(past)
            row[:] = np.where(row > 0, row / scale, row * scale) - frequency * times - presence * (times > 0)
    if which != "penalties":
        given["bitmask"] = mx.array(bitmask)
        bits = np.unpackbits(bitmask.view(np.uint8), axis=1, bitorder="little")[:, :vocab]
        want = np.where(bits == 1, want, -np.inf)
    found = use.adjust_logits(logits, **given)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), want, rtol=1e-5, atol=1e-5)


def test_a_device_without_kernels_uses_the_twins():
    logits, packed = mx.zeros((0, 16)), mx.zeros((0, 8))
    assert metal_kernels.sample_rows(logits, mx.zeros(8), packed).shape == (0,)
    assert metal_kernels.adjust_logits(mx.zeros((2, 16), mx.float16)).dtype == mx.float32


def test_says_why_not():
    assert "CPU" in kernels.sample_kernel("cpu", mx.float32, 64).why
    assert "int32" in kernels.sample_kernel("cuda", mx.int32, 64).why
    assert "rows of 4 logits" in kernels.sample_kernel("cuda", mx.float32, 4).why
    assert kernels.sample_kernel("cuda", mx.bfloat16, 151936) == kernels.Accepted(SampleVariant(512))
    assert kernels.sample_kernel("metal", mx.float32, 50257) == kernels.Accepted(SampleVariant(256))


def test_wrong_shapes_are_refused():
    logits = mx.zeros((3, 64))
    with pytest.raises(metal_kernels.MetalKernelsError, match="rules"):
        metal_kernels.sample_rows(logits, mx.zeros(8), mx.zeros((2, 8)))
    with pytest.raises(metal_kernels.MetalKernelsError, match="Pad them"):
        metal_kernels.sample_rows(logits, mx.zeros(3), mx.zeros((3, 8)))
    with pytest.raises(metal_kernels.MetalKernelsError, match="Pass both"):
        metal_kernels.adjust_logits(logits, penalties=mx.zeros((3, 8)))
    with pytest.raises(metal_kernels.MetalKernelsError, match="Pad the bitmask"):
        metal_kernels.adjust_logits(logits, bitmask=mx.zeros((3, 1), mx.int32))
