"""One token of recurrent layers, whose states lie in pages and change there."""

import mlx.core as mx
from jaxtyping import Float, Int32, UInt32

from metal_kernels.gated_delta_rows import GatedDeltaRows
from metal_kernels.kernels.dispatch import GatedDeltaVariant
from metal_kernels.kernels.source import PortableKernel, constants, order_input

_THREADS = 256
_GATED_DELTA = PortableKernel(
    "gated_delta_decode",
    ("projected_in", "pages_in", "blocks_in", "conv_in", "gates_in", "norm_in", "factors_in", "order_in"),
    ("out",),
    "gated_delta_decode.metal",
)
_SHORT_CONV = PortableKernel(
    "short_conv_decode",
    ("projected_in", "pages_in", "blocks_in", "conv_in", "bias_in", "order_in"),
    ("out",),
    "short_conv_decode.metal",
)


def gated_delta_decode(
    projected: Float[mx.array, "tokens width"],
    pages: UInt32[mx.array, "blocks words"],
    blocks: Int32[mx.array, "slots"],
    rows: GatedDeltaRows,
    variant: GatedDeltaVariant,
    *,
    conv: Float[mx.array, "channels taps"],
    gates: Float[mx.array, "gates"],
    norm: Float[mx.array, "v_size"],
    eps: float,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "tokens values"], UInt32[mx.array, "blocks words"]]:
    """Advance states in place; see :func:`metal_kernels.gated_delta_decode`."""
    tokens = projected.shape[0]
    parts = {
        "QUERY": rows.query,
        "KEY": rows.key,
        "VALUE": rows.value,
        "GATE": rows.gate,
        "BETA": rows.beta,
        "DECAY": rows.decay,
    }
    template: dict[str, int | mx.Dtype] = {
        "T": projected.dtype,
        "K_HEADS": rows.k_heads,
        "V_HEADS": rows.v_heads,
        "K_SIZE": rows.k_size,
        "V_SIZE": rows.v_size,
        "TAPS": rows.taps,
        "PAGE_WORDS": pages.shape[1],
        "MEMORY_WORD": rows.state_words(projected.dtype)[0],
        "AFTER": blocks.size // 2,
        "SIMDGROUPS": variant.simdgroups,
        "UNROLLED": variant.unrolled,
    }
    for name, part in parts.items():
        template |= {name: part.start, f"{name}_STEP": part.step}
    (out,) = _GATED_DELTA(
        [projected, pages, blocks, conv, gates, norm, constants(eps), order_input(order_token)],
        [((tokens, rows.v_heads * rows.v_size), projected.dtype)],
        threadgroups=(tokens, rows.k_heads),
        threads=variant.simdgroups * 32,
        template=template,
    )
    return out, pages


def short_conv_decode(
    projected: Float[mx.array, "tokens thrice_width"],
    pages: UInt32[mx.array, "blocks words"],
    blocks: Int32[mx.array, "slots"],
    *,
    conv: Float[mx.array, "width taps"],
    bias: Float[mx.array, "width"] | None = None,
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "tokens width"], UInt32[mx.array, "blocks words"]]:
    """Advance states in place; see :func:`metal_kernels.short_conv_decode`."""
    tokens, (width, taps) = projected.shape[0], conv.shape
    (out,) = _SHORT_CONV(
        [projected, pages, blocks, conv, constants(0.0) if bias is None else bias, order_input(order_token)],
        [((tokens, width), projected.dtype)],
        threadgroups=(tokens, -(-width // _THREADS)),
        threads=_THREADS,
        template={
            "T": projected.dtype,
            "WIDTH": width,
            "TAPS": taps,
            "PAGE_WORDS": pages.shape[1],
            "AFTER": blocks.size // 2,
            "THREADS": _THREADS,
            "BIAS": bias is not None,
        },
    )
    return out, pages
