"""One token of recurrent layers in the kernels, against the same in float64."""

import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from metal_kernels import GatedDeltaRows, HeadPart, Mamba2Rows, kernels, reference
from metal_kernels.kernels.dispatch import FLOAT_DTYPES

TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
BLOCKS = 7
BEFORE, AFTER = [3, 0, 5, 0], [3, 2, 6, -1]  # stays, starts, moves on, pads the step


def by_head(k_heads, ratio, k_size, v_size, taps=4):
    """Queries, keys, values and gates of a key head together, then its numbers."""
    step, numbers = 2 * (k_size + ratio * v_size), k_heads * 2 * (k_size + ratio * v_size)
    starts = {"query": 0, "key": k_size, "value": 2 * k_size, "gate": 2 * k_size + ratio * v_size}
    parts = {name: HeadPart(start, step) for name, start in starts.items()}
    parts |= {"beta": HeadPart(numbers, 2 * ratio), "decay": HeadPart(numbers + ratio, 2 * ratio)}
    return GatedDeltaRows(k_heads, k_heads * ratio, k_size, v_size, taps, **parts)


def by_kind(k_heads, ratio, k_size, v_size, taps=4):
    """All queries, all keys, all values, all gates, then the numbers."""
    keys, values, heads = k_heads * k_size, k_heads * ratio * v_size, k_heads * ratio
    starts = np.cumsum([0, keys, keys, values, values, heads]).tolist()
    steps = [k_size, k_size, ratio * v_size, ratio * v_size, ratio, ratio]
    parts = [HeadPart(start, step) for start, step in zip(starts, steps, strict=True)]
    return GatedDeltaRows(k_heads, heads, k_size, v_size, taps, *parts)


def random(rng, *shape, dtype=mx.float32):
    array = mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    mx.eval(array)
    return array


def exact(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def packed(states):
    return mx.concatenate([mx.contiguous(a.reshape(a.shape[0], -1)).view(mx.uint32) for a in states], axis=1)


def inputs(rows, dtype, padding=4):
    rng = np.random.default_rng(0)
    states = [
        random(rng, BLOCKS, *shape, dtype=kind)
        for shape, kind in zip(rows.state_shapes, (dtype, mx.float32), strict=True)
    ]
    states = [mx.where((mx.arange(BLOCKS) == 0).reshape(-1, *[1] * (a.ndim - 1)), 0, a) for a in states]
    pages = mx.pad(packed(states), [(0, 0), (0, padding)], constant_values=7)
    projected = random(rng, 2 * len(AFTER), rows.width, dtype=dtype)[::2]
    gates = mx.pad(mx.concatenate([-mx.exp(random(rng, rows.v_heads)), random(rng, rows.v_heads)]), (0, 8))
    weights = {
        "conv": random(rng, rows.channels, rows.taps, dtype=dtype),
        "gates": gates,
        "norm": random(rng, rows.v_size, dtype=dtype),
    }
    mx.eval(pages, projected, weights)
    return projected, states, pages, weights


def wanted(rows, projected, states, weights, eps):
    """Return the outputs and the two arrays of the new states, token by token and head by head."""
    row, (histories, memories) = exact(projected), [exact(a) for a in states]
    weight = {name: exact(array) for name, array in weights.items()}
    ratio, keys = rows.v_heads // rows.k_heads, rows.k_heads * rows.k_size
    outs, new_histories, new_memories = [], [], []
    for x, block in zip(row, BEFORE, strict=True):

        def part(of, head, size, x=x):
            return x[of.start + head * of.step : of.start + head * of.step + size]

        heads = range(rows.k_heads)
        newest = np.concatenate(
            [part(rows.query, h, rows.k_size) for h in heads]
            + [part(rows.key, h, rows.k_size) for h in heads]
            + [part(rows.value, h, ratio * rows.v_size) for h in heads]
        )
        seen = np.vstack([histories[block], newest])
        mixed = silu((seen * weight["conv"].T).sum(axis=0))
        out, memory = np.zeros((rows.v_heads, rows.v_size)), memories[block].copy()
        for head in range(rows.v_heads):
            h, j = divmod(head, ratio)
            query, key = (mixed[at + h * rows.k_size :][: rows.k_size] for at in (0, keys))
            query = query / np.sqrt((query**2).sum() + 1e-6) / np.sqrt(rows.k_size)
            key = key / np.sqrt((key**2).sum() + 1e-6)
            value = mixed[2 * keys + head * rows.v_size :][: rows.v_size]
            beta = 1 / (1 + np.exp(-part(rows.beta, h, ratio)[j]))
            time = part(rows.decay, h, ratio)[j] + weight["gates"][rows.v_heads + head]
            memory[head] *= np.exp(weight["gates"][head] * np.log1p(np.exp(time)))
            memory[head] += np.outer((value - memory[head] @ key) * beta, key)
            read = memory[head] @ query
            gate = part(rows.gate, h, ratio * rows.v_size)[j * rows.v_size :][: rows.v_size]
            out[head] = read / np.sqrt((read**2).mean() + eps) * weight["norm"] * silu(gate)
        outs.append(out.reshape(-1))
        new_histories.append(seen[1:])
        new_memories.append(memory)
    return np.stack(outs), np.stack(new_histories), np.stack(new_memories)


def check_pages(pages, before, shapes, dtypes, new_states, tolerance):
    """Compare the pages that states went to with ``new_states``, and all others with what they were."""
    words = [int(np.prod(shape)) * dtype.size // 4 for shape, dtype in zip(shapes, dtypes, strict=True)]
    after = np.array(AFTER)
    start = 0
    for count, shape, dtype, new in zip(words, shapes, dtypes, new_states, strict=True):
        found = mx.contiguous(pages[:, start : start + count]).view(dtype).reshape(-1, *shape)
        np.testing.assert_allclose(exact(found)[after[after > 0]], new[after > 0], rtol=tolerance, atol=tolerance)
        start += count
    kept = [block for block in range(BLOCKS) if block not in AFTER]
    assert mx.array_equal(pages[mx.array(kept)], before[mx.array(kept)])
    assert mx.array_equal(pages[:, start:], before[:, start:])


@pytest.mark.parametrize("decode", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("layout", "heads", "dtype"),
    [
        (by_head, (2, 2, 32, 32), mx.float32),
        (by_kind, (2, 2, 64, 32), mx.float16),
        (by_head, (1, 1, 32, 96), mx.bfloat16),
        (by_kind, (1, 4, 128, 128), mx.bfloat16),
    ],
)
def test_gated_delta(decode, layout, heads, dtype):
    rows = layout(*heads)
    projected, states, pages, weights = inputs(rows, dtype)
    before = mx.array(np.array(pages))
    blocks = mx.array(BEFORE + AFTER, mx.int32)
    options = {"eps": 1e-5, **weights}
    if decode is kernels:
        for target in ("metal", "cuda"):
            found = kernels.gated_delta_kernel(target, dtype, pages.shape[1], rows)
            assert isinstance(found, kernels.Accepted)
        options["variant"] = found.variant
    out, written = decode.gated_delta_decode(projected, pages, blocks, rows, **options)
    mx.eval(out, written)
    assert out.dtype == dtype
    assert (written is pages) == (decode is kernels)
    want, *new_states = wanted(rows, projected, states, weights, options["eps"])
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(exact(out), want, rtol=tolerance, atol=tolerance)
    check_pages(written, before, rows.state_shapes, (dtype, mx.float32), new_states, tolerance)


def test_gated_delta_kernel_says_why_not():
    def why(target="cuda", dtype=mx.bfloat16, words=4096, heads=(2, 2, 32, 32), taps=4):
        return kernels.gated_delta_kernel(target, dtype, words, by_head(*heads, taps)).why

    assert "CPU" in why("cpu")
    assert "int32" in why(dtype=mx.int32)
    assert "keys of 16" in why(heads=(2, 2, 16, 32))
    assert "16 bytes" in why(words=4098)
    assert "CPU" in kernels.short_conv_kernel("cpu", mx.float32, 64, 3).why
    assert "whole words" in kernels.short_conv_kernel("cuda", mx.float16, 9, 2).why


@pytest.mark.parametrize("decode", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("width", "taps", "biased"), [(8, 3, True), (300, 4, False), (64, 2, True)])
def test_short_conv(decode, dtype, width, taps, biased):
    rng = np.random.default_rng(0)
    projected = random(rng, 2 * len(AFTER), 3 * width, dtype=dtype)[::2]
    conv, bias = random(rng, width, taps, dtype=dtype), random(rng, width, dtype=dtype) if biased else None
    states = random(rng, BLOCKS, taps - 1, width, dtype=dtype)
    states = mx.where((mx.arange(BLOCKS) == 0)[:, None, None], 0, states)
    pages = mx.pad(packed([states]), [(0, 0), (0, 3)], constant_values=7)
    mx.eval(pages)
    before = mx.array(np.array(pages))
    blocks = mx.array(BEFORE + [0] * 2 + AFTER + [-1] * 2, mx.int32)
    out, written = decode.short_conv_decode(projected, pages, blocks, conv=conv, bias=bias)
    mx.eval(out, written)
    assert (written is pages) == (decode is kernels)
    gate_in, gate_out, x = np.split(exact(projected), 3, axis=1)
    seen = np.concatenate([exact(states)[BEFORE], (gate_in * x)[:, None]], axis=1)
    want = gate_out * ((seen * exact(conv).T).sum(axis=1) + (exact(bias) if biased else 0))
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(exact(out), want, rtol=tolerance, atol=tolerance)
    check_pages(written, before, [(taps - 1, width)], [dtype], [seen[:, 1:]], tolerance)


def mamba_inputs(rows, dtype, biased, padding=4):
    rng = np.random.default_rng(0)
    states = [
        random(rng, BLOCKS, *shape, dtype=kind)
        for shape, kind in zip(rows.state_shapes, (dtype, mx.float32), strict=True)
    ]
    states = [mx.where((mx.arange(BLOCKS) == 0).reshape(-1, *[1] * (a.ndim - 1)), 0, a) for a in states]
    pages = mx.pad(packed(states), [(0, 0), (0, padding)], constant_values=7)
    projected = random(rng, 2 * len(AFTER), rows.width, dtype=dtype)[::2]
    heads = [random(rng, rows.heads), -mx.exp(random(rng, rows.heads)), random(rng, rows.heads)]
    weights = {
        "conv": random(rng, rows.channels, rows.taps, dtype=dtype),
        "bias": random(rng, rows.channels, dtype=dtype) if biased else None,
        "heads": mx.pad(mx.concatenate(heads), (0, 8)),
    }
    mx.eval(pages, projected, [array for array in weights.values() if array is not None])
    return projected, states, pages, weights


def mamba_wanted(rows, projected, states, weights, limits, gated):
    """Return the outputs and the two arrays of the new states, token by token and head by head."""
    histories, memories = (exact(a) for a in states)
    bias = 0 if weights["bias"] is None else exact(weights["bias"])
    numbers = exact(weights["heads"])
    outs, new_histories, new_memories = [], [], []
    for x, block in zip(exact(projected), BEFORE, strict=True):
        gate, newest, times = np.split(x, [rows.values, rows.values + rows.channels])
        seen = np.vstack([histories[block], newest])
        mixed = silu((seen * exact(weights["conv"]).T).sum(axis=0) + bias)
        out, memory = np.zeros((rows.heads, rows.head_size)), memories[block].copy()
        for head in range(rows.heads):
            group = head // (rows.heads // rows.groups)
            value = mixed[head * rows.head_size :][: rows.head_size]
            writing, reading = (
                mixed[rows.values + (kind * rows.groups + group) * rows.state_size :][: rows.state_size]
                for kind in (0, 1)
            )
            time = np.clip(np.log1p(np.exp(times[head] + numbers[head])), *limits)
            memory[head] *= np.exp(numbers[rows.heads + head] * time)
            memory[head] += np.outer(value * time, writing)
            out[head] = memory[head] @ reading + numbers[2 * rows.heads + head] * value
        outs.append(out.reshape(-1) * (silu(gate) if gated else 1))
        new_histories.append(seen[1:])
        new_memories.append(memory)
    return np.stack(outs), np.stack(new_histories), np.stack(new_memories)


@pytest.mark.parametrize("decode", [kernels, reference], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("sizes", "dtype", "biased", "gated", "limits"),
    [
        ((4, 32, 1, 32, 4), mx.float32, True, True, (0.0, float("inf"))),
        ((4, 64, 2, 64, 4), mx.float16, True, False, (0.001, 1.0)),
        ((2, 20, 2, 128, 2), mx.bfloat16, False, True, (0.001, 100.0)),
        ((2, 64, 1, 256, 4), mx.bfloat16, True, True, (0.0, float("inf"))),
    ],
)
def test_mamba2(decode, sizes, dtype, biased, gated, limits):
    rows = Mamba2Rows(*sizes)
    projected, states, pages, weights = mamba_inputs(rows, dtype, biased)
    before = mx.array(np.array(pages))
    blocks = mx.array(BEFORE + AFTER, mx.int32)
    options = {"limits": limits, "gated": gated, **weights}
    if decode is kernels:
        for target in ("metal", "cuda"):
            found = kernels.mamba2_kernel(target, dtype, pages.shape[1], rows)
            assert isinstance(found, kernels.Accepted)
        options["variant"] = found.variant
    out, written = decode.mamba2_decode(projected, pages, blocks, rows, **options)
    mx.eval(out, written)
    assert out.dtype == dtype
    assert (written is pages) == (decode is kernels)
    want, *new_states = mamba_wanted(rows, projected, states, weights, limits, gated)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(exact(out), want, rtol=tolerance, atol=tolerance * np.abs(want).max())
    check_pages(written, before, rows.state_shapes, (dtype, mx.float32), new_states, tolerance)


def test_mamba2_kernel_says_why_not():
    def why(target="cuda", dtype=mx.bfloat16, words=4096, sizes=(4, 32, 1, 32, 4)):
        return kernels.mamba2_kernel(target, dtype, words, Mamba2Rows(*sizes)).why

    assert "CPU" in why("cpu")
    assert "int32" in why(dtype=mx.int32)
    assert "16 numbers" in why(sizes=(4, 32, 1, 16, 4))
    assert "16 bytes" in why(words=4098)
    rows = Mamba2Rows(4, 32, 1, 32, 4)
    projected, _, pages, weights = mamba_inputs(rows, mx.float32, True)
    with pytest.raises(metal_kernels.MetalKernelsError, match="three numbers"):
        metal_kernels.mamba2_decode(
            projected, pages, mx.array(BEFORE + AFTER, mx.int32), rows, limits=(0.0, 1.0), gated=True,
            **(weights | {"heads": weights["heads"][:9]}),
        )  # fmt: skip


def test_wrong_shapes_are_refused():
    rows = by_head(2, 2, 32, 32)
    projected, _, pages, weights = inputs(rows, mx.float32)
    blocks = mx.array(BEFORE + AFTER, mx.int32)
    with pytest.raises(metal_kernels.MetalKernelsError, match="two blocks for each of 4 rows"):
        metal_kernels.gated_delta_decode(projected, pages, blocks[:6], rows, eps=1e-5, **weights)
    with pytest.raises(metal_kernels.MetalKernelsError, match="pages of at least"):
        metal_kernels.gated_delta_decode(projected, pages[:, :64], blocks, rows, eps=1e-5, **weights)
    with pytest.raises(metal_kernels.MetalKernelsError, match="two numbers"):
        metal_kernels.gated_delta_decode(
            projected, pages, blocks, rows, eps=1e-5, **(weights | {"gates": weights["gates"][:6]})
        )
