"""One token of recurrent layers, whose states lie in pages of a cache."""

import mlx.core as mx
from jaxtyping import Float, Int32, UInt32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_rows
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError
from metal_kernels.gated_delta_rows import GatedDeltaRows
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
    """Compute one token of a gated delta net (arXiv:2412.06464) for each request, and leave its state in a page.

    Convolution and SiLU, queries and keys of length 1, the delta rule, and a root-mean-square norm of each value
    head, gated by a SiLU. On a GPU states change in ``pages`` itself: then a later reader of a page takes the output,
    or what follows from it, as its order token.

    Args:
        projected: The layer's projections of each row, side by side as ``rows`` says.
        pages: Pages of one layer; each starts with a state. Block 0 is zero: the state of a request that starts.
        blocks: For each row the block of its state, then, in the second half, the block that the new state goes to:
            the same or another one. Rows with a target of 0 or less leave no state. May have more slots than rows.
        rows: What ``projected`` holds.
        conv: Weights of the convolution, the oldest token's first.
        gates: ``-exp(A)`` of every value head, then the bias of its ``decay``; float32, at least 8 elements.
        norm: Weights of the norm.
        eps: Added to the mean square.
        order_token: Of the last write to the pages, where ``projected`` does not follow from it.

    Returns:
        The gated output of all value heads, and the pages.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    tokens = projected.shape[0]
    require_rows("gated_delta_decode", "projected", projected, (tokens, rows.width))
    require_rows("gated_delta_decode", "conv", conv, (rows.channels, rows.taps))
    require_rows("gated_delta_decode", "norm", norm, (rows.v_size,))
    _require_pages("gated_delta_decode", pages, sum(rows.state_words(projected.dtype)))
    _require_blocks("gated_delta_decode", blocks, tokens)
    if gates.size < max(8, 2 * rows.v_heads):
        raise MetalKernelsError(
            f"[gated_delta_decode] expected two numbers for each of {rows.v_heads} value heads and at least 8, got "
            f"{gates.size}. Pad with zeros."
        )
    weights = {"conv": conv, "gates": gates, "norm": norm}
    decode = kernels.gated_delta_kernel(target(), projected.dtype, pages.shape[1], rows)
    if isinstance(decode, kernels.Accepted) and tokens and kernels.writes_in_place():
        return kernels.gated_delta_decode(
            projected, pages, blocks, rows, decode.variant, eps=eps, order_token=order_token, **weights
        )
    return reference.gated_delta_decode(projected, pages, blocks, rows, eps=eps, **weights)


def short_conv_decode(
    projected: Float[mx.array, "tokens thrice_width"],
    pages: UInt32[mx.array, "blocks words"],
    blocks: Int32[mx.array, "slots"],
    *,
    conv: Float[mx.array, "width taps"],
    bias: Float[mx.array, "width"] | None = None,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "tokens width"], UInt32[mx.array, "blocks words"]]:
    """Compute one token of a gated short convolution (LFM2) for each request, and leave its state in a page.

    A state is the last ``taps - 1`` inputs of the convolution, in the rows' dtype. What
    :func:`gated_delta_decode` says of pages, blocks and order holds here too.

    Args:
        projected: What gates the input, what gates the output, and the input, side by side.
        pages: Pages of one layer; each starts with a state.
        blocks: For each row the block of its state, then the block that the new state goes to.
        conv: Weights of the convolution, the oldest token's first.
        bias: Added to what the convolution makes of each channel.
        order_token: Of the last write to the pages, where ``projected`` does not follow from it.

    Returns:
        The gated convolution, and the pages.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    tokens, (width, taps) = projected.shape[0], conv.shape
    require_rows("short_conv_decode", "projected", projected, (tokens, 3 * width))
    if bias is not None:
        require_rows("short_conv_decode", "bias", bias, (width,))
    _require_pages("short_conv_decode", pages, (taps - 1) * width * projected.dtype.size // 4)
    _require_blocks("short_conv_decode", blocks, tokens)
    decode = kernels.short_conv_kernel(target(), projected.dtype, width, taps)
    if isinstance(decode, kernels.Accepted) and tokens and kernels.writes_in_place():
        return kernels.short_conv_decode(projected, pages, blocks, conv=conv, bias=bias, order_token=order_token)
    return reference.short_conv_decode(projected, pages, blocks, conv=conv, bias=bias)


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
    """Compute one token of a Mamba 2 layer (arXiv:2405.21060) for each request, and leave its state in a page.

    Convolution and SiLU, the selective state space, and the gate; what norms the result sees all heads and is left to
    the caller. What :func:`gated_delta_decode` says of pages, blocks and order holds here too.

    Args:
        projected: The layer's projection of each row, as ``rows`` says.
        pages: Pages of one layer; each starts with a state.
        blocks: For each row the block of its state, then the block that the new state goes to.
        rows: What ``projected`` holds.
        conv: Weights of the convolution, the oldest token's first.
        bias: Added to what the convolution makes of each channel.
        heads: Bias of every head's time step, ``-exp(A)`` of every head, and its skip ``D``; float32, at least 8
            elements.
        limits: Least and largest time step.
        gated: Whether the result is multiplied with the SiLU of the gate; else the caller does that.
        order_token: Of the last write to the pages, where ``projected`` does not follow from it.

    Returns:
        The values of all heads, and the pages.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    tokens = projected.shape[0]
    require_rows("mamba2_decode", "projected", projected, (tokens, rows.width))
    require_rows("mamba2_decode", "conv", conv, (rows.channels, rows.taps))
    if bias is not None:
        require_rows("mamba2_decode", "bias", bias, (rows.channels,))
    _require_pages("mamba2_decode", pages, sum(rows.state_words(projected.dtype)))
    _require_blocks("mamba2_decode", blocks, tokens)
    if heads.size < max(8, 3 * rows.heads):
        raise MetalKernelsError(
            f"[mamba2_decode] expected three numbers for each of {rows.heads} heads and at least 8, got {heads.size}. "
            "Pad with zeros."
        )
    decode = kernels.mamba2_kernel(target(), projected.dtype, pages.shape[1], rows)
    if isinstance(decode, kernels.Accepted) and tokens and kernels.writes_in_place():
        return kernels.mamba2_decode(
            projected, pages, blocks, rows, decode.variant,
            conv=conv, bias=bias, heads=heads, limits=limits, gated=gated, order_token=order_token,
        )  # fmt: skip
    return reference.mamba2_decode(
        projected, pages, blocks, rows, conv=conv, bias=bias, heads=heads, limits=limits, gated=gated
    )


def _require_pages(operation: str, pages: mx.array, words: int) -> None:
    if pages.shape[1] < words:
        raise MetalKernelsError(
            f"[{operation}] expected pages of at least {words} words of 4 bytes, got {pages.shape[1]}. "
            "A page holds a whole state."
        )


def _require_blocks(operation: str, blocks: mx.array, tokens: int) -> None:
    if blocks.size % 2 or blocks.size < 2 * tokens:
        raise MetalKernelsError(
            f"[{operation}] expected two blocks for each of {tokens} rows, got {blocks.size}. "
            "Pass those that states are read from, then those that they go to."
        )
