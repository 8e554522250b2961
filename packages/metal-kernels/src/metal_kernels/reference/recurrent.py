"""One token of recurrent layers over states in pages, with plain MLX operations."""

from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int32, UInt32

from metal_kernels.gated_delta_rows import GatedDeltaRows, HeadPart
from metal_kernels.mamba2_rows import Mamba2Rows


def gated_delta_decode(
    projected: Float[mx.array, "tokens width"],
    pages: UInt32[mx.array, "blocks words"],
    blocks: Int32[mx.array, "slots"],
    rows: GatedDeltaRows,
    *,
    conv: Float[mx.array, "channels taps"],
    gates: Float[mx.array, "gates"],
    norm: Float[mx.array, "v_size"],
    eps: float,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "tokens values"], UInt32[mx.array, "blocks words"]]:
    """Advance states; see :func:`metal_kernels.gated_delta_decode`. Returns a new array of pages."""
    del order_token
    tokens, ratio, dtype = projected.shape[0], rows.v_heads // rows.k_heads, projected.dtype
    before, after = _halves(blocks, tokens)
    history_words, memory_words = rows.state_words(dtype)
    states = pages[before]
    history = states[:, :history_words].view(dtype).reshape(tokens, *rows.state_shapes[0])
    memory = states[:, history_words : history_words + memory_words].view(mx.float32)
    memory = memory.reshape(tokens, *rows.state_shapes[1])

    def part(of: HeadPart, size: int) -> mx.array:
        heads = mx.arange(rows.k_heads)[:, None] * of.step + of.start
        return projected[:, (heads + mx.arange(size)).reshape(-1)]

    newest = mx.concatenate(
        [part(rows.query, rows.k_size), part(rows.key, rows.k_size), part(rows.value, ratio * rows.v_size)], axis=1
    )
    mixed, history = _convolve(newest, history, conv)
    mixed = nn.silu(mixed)
    split = [rows.k_heads * rows.k_size, 2 * rows.k_heads * rows.k_size]
    query, key, value = mx.split(mixed, split, axis=1)
    query, key = (_unit(heads.reshape(tokens, rows.k_heads, -1)) for heads in (query, key))
    query, key = (mx.repeat(heads, ratio, axis=1) for heads in (query * rows.k_size**-0.5, key))
    beta, decay = (part(of, ratio).astype(mx.float32) for of in (rows.beta, rows.decay))
    forget = mx.exp(gates[: rows.v_heads] * nn.softplus(decay + gates[rows.v_heads : 2 * rows.v_heads]))
    memory = memory * forget[..., None, None]
    known = (memory * key[:, :, None]).sum(axis=-1)
    delta = (value.reshape(known.shape) - known) * mx.sigmoid(beta)[..., None]
    memory = memory + key[:, :, None] * delta[..., None]
    read = (memory * query[:, :, None]).sum(axis=-1).astype(dtype)
    gate = part(rows.gate, ratio * rows.v_size).reshape(read.shape).astype(mx.float32)
    normed = mx.fast.rms_norm(read.astype(mx.float32), norm.astype(mx.float32), eps)
    out = (normed * nn.silu(gate)).astype(dtype).reshape(tokens, -1)
    return out, _written(pages, after, [history, memory])


def short_conv_decode(
    projected: Float[mx.array, "tokens thrice_width"],
    pages: UInt32[mx.array, "blocks words"],
    blocks: Int32[mx.array, "slots"],
    *,
    conv: Float[mx.array, "width taps"],
    bias: Float[mx.array, "width"] | None = None,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "tokens width"], UInt32[mx.array, "blocks words"]]:
    """Advance states; see :func:`metal_kernels.short_conv_decode`. Returns a new array of pages."""
    del order_token
    tokens, (width, taps), dtype = projected.shape[0], conv.shape, projected.dtype
    before, after = _halves(blocks, tokens)
    words = prod((taps - 1, width)) * dtype.size // 4
    history = pages[before][:, :words].view(dtype).reshape(tokens, taps - 1, width)
    gate_in, gate_out, rows = mx.split(projected, 3, axis=1)
    mixed, history = _convolve(gate_in * rows, history, conv)
    if bias is not None:
        mixed = mixed + bias.astype(mx.float32)
    return gate_out * mixed.astype(dtype), _written(pages, after, [history])


def mamba2_decode(
    projected: Float[mx.array, "tokens width"],
    pages: UInt32[mx.array, "blocks words"],
    blocks: Int32[mx.array, "slots"],
    rows: Mamba2Rows,
    *,
    conv: Float[mx.array, "channels taps"],
    bias: Float[mx.array, "channels"] | None,
    heads: Float[mx.array, "numbers"],
    limits: tuple[float, float],
    gated: bool,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "tokens values"], UInt32[mx.array, "blocks words"]]:
    """Advance states; see :func:`metal_kernels.mamba2_decode`. Returns a new array of pages."""
    del order_token
    tokens, dtype, count = projected.shape[0], projected.dtype, rows.heads
    before, after = _halves(blocks, tokens)
    history_words, memory_words = rows.state_words(dtype)
    states = pages[before]
    history = states[:, :history_words].view(dtype).reshape(tokens, *rows.state_shapes[0])
    memory = states[:, history_words : history_words + memory_words].view(mx.float32)
    memory = memory.reshape(tokens, *rows.state_shapes[1])
    gate, newest, time = mx.split(projected, [rows.values, rows.values + rows.channels], axis=1)
    mixed, history = _convolve(newest, history, conv)
    if bias is not None:
        mixed = mixed + bias.astype(mx.float32)
    mixed = nn.silu(mixed).astype(dtype).astype(mx.float32)
    numbers = rows.groups * rows.state_size
    value, writing, reading = mx.split(mixed, [rows.values, rows.values + numbers], axis=1)
    value = value.reshape(tokens, count, rows.head_size)
    writing, reading = (part.reshape(tokens, rows.groups, 1, -1) for part in (writing, reading))
    writing, reading = (mx.repeat(part, count // rows.groups, axis=1) for part in (writing, reading))
    time = mx.clip(nn.softplus(time.astype(mx.float32) + heads[:count]), *limits)[..., None]
    decay = mx.exp(heads[count : 2 * count, None] * time)
    memory = memory * decay[..., None] + (value * time)[..., None] * writing
    out = (memory * reading).sum(axis=-1) + value * heads[2 * count : 3 * count, None]
    out = out.reshape(tokens, rows.values)
    if gated:
        out = out * nn.silu(gate.astype(mx.float32))
    return out.astype(dtype), _written(pages, after, [history, memory])


def _halves(blocks: mx.array, tokens: int) -> tuple[mx.array, np.ndarray]:
    """Return the blocks that states are read from, and, on the host, those that they go to."""
    slots = blocks.size // 2
    return blocks[:tokens], np.asarray(blocks)[slots : slots + tokens]


def _convolve(newest: mx.array, history: mx.array, conv: mx.array) -> tuple[mx.array, mx.array]:
    """Return the convolution of each channel in float32, and the history that ends with ``newest``."""
    seen = mx.concatenate([history, newest[:, None]], axis=1)
    return (seen.astype(mx.float32) * conv.T.astype(mx.float32)).sum(axis=1), seen[:, 1:]


def _unit(heads: mx.array) -> mx.array:
    return heads * mx.rsqrt((heads * heads).sum(axis=-1, keepdims=True) + 1e-6)


def _written(pages: mx.array, after: np.ndarray, arrays: list[mx.array]) -> mx.array:
    """Return pages that hold ``arrays`` where ``after`` is a block."""
    kept = np.flatnonzero(after > 0)
    if kept.size == 0:
        return pages
    states = mx.concatenate([mx.contiguous(a.reshape(a.shape[0], -1)).view(mx.uint32) for a in arrays], axis=1)
    written = pages.reshape(pages.shape)  # another object: assignment changes the one it is made to
    written[mx.array(after[kept]), : states.shape[1]] = states[mx.array(kept.astype(np.int32))]
    return written
