"""One token of Mamba 2 layers, whose states lie in pages and change there: a convolution, then the memory."""

import mlx.core as mx
from jaxtyping import Float, Int32, UInt32

from metal_kernels.kernels.dispatch import MemoryVariant
from metal_kernels.kernels.source import PortableKernel, constants, order_input
from metal_kernels.mamba2_rows import Mamba2Rows

_THREADS = 256
_CONVOLUTION = PortableKernel(
    "conv_silu_decode",
    ("projected_in", "pages_in", "blocks_in", "conv_in", "bias_in", "order_in"),
    ("out",),
    "conv_silu_decode.metal",
)
_MEMORY = PortableKernel(
    "selective_state_decode",
    ("mixed_in", "projected_in", "pages_in", "blocks_in", "heads_in", "factors_in"),
    ("out",),
    "selective_state_decode.metal",
)


def mamba2_decode(
    projected: Float[mx.array, "tokens width"],
    pages: UInt32[mx.array, "blocks words"],
    blocks: Int32[mx.array, "slots"],
    rows: Mamba2Rows,
    variant: MemoryVariant,
    *,
    conv: Float[mx.array, "channels taps"],
    bias: Float[mx.array, "channels"] | None,
    heads: Float[mx.array, "numbers"],
    limits: tuple[float, float],
    gated: bool,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "tokens values"], UInt32[mx.array, "blocks words"]]:
    """Advance states in place; see :func:`metal_kernels.mamba2_decode`."""
    tokens, dtype = projected.shape[0], projected.dtype
    shared: dict[str, int | mx.Dtype] = {"T": dtype, "PAGE_WORDS": pages.shape[1], "AFTER": blocks.size // 2}
    (mixed,) = _CONVOLUTION(
        [projected, pages, blocks, conv, constants(0.0) if bias is None else bias, order_input(order_token)],
        [((tokens, rows.channels), dtype)],
        threadgroups=(tokens, -(-rows.channels // _THREADS)),
        threads=_THREADS,
        template=shared
        | {
            "CHANNELS": rows.channels,
            "FIRST": rows.values,
            "TAPS": rows.taps,
            "THREADS": _THREADS,
            "BIAS": bias is not None,
        },
    )
    # The convolution's rows order the second kernel after the first, and with it after whatever that waited for.
    (out,) = _MEMORY(
        [mixed, projected, pages, blocks, heads, constants(*limits)],
        [((tokens, rows.values), dtype)],
        threadgroups=(tokens, rows.heads),
        threads=variant.simdgroups * 32,
        template=shared
        | {
            "HEADS": rows.heads,
            "HEAD_SIZE": rows.head_size,
            "GROUPS": rows.groups,
            "STATE_SIZE": rows.state_size,
            "MEMORY_WORD": rows.state_words(dtype)[0],
            "SIMDGROUPS": variant.simdgroups,
            "UNROLLED": variant.unrolled,
            "GATED": gated,
        },
    )
    return out, pages
