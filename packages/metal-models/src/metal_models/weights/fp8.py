"""FP8 checkpoints (DeepSeek, Qwen3-FP8, FBGEMM): E4M3 numbers with a scale per block, per row or per tensor."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from metal_models.errors import MetalModelsError
from metal_models.weights.parts import Format, MLXForm, Parts
from metal_models.weights.stored import Float8Weight

_SCALES = ("_scale_inv", "_scale")
_MANTISSA_BITS = 23  # of a float32, whose exponents are E8M0 numbers but for the least, which is a subnormal number
_LEAST = 1 << (_MANTISSA_BITS - 1)


def _check(settings: Mapping[str, Any]) -> None:
    kind = str(settings.get("fmt", "e4m3")).lower()
    if not kind.startswith(("e4m3", "float8_e4m3")):
        raise MetalModelsError(f"[load] expected FP8 weights of format e4m3, got {kind}. Use another quantisation.")


def _kept(_: str, settings: Mapping[str, Any]) -> MLXForm | None:
    return MLXForm(8, 32, "mxfp8") if settings.get("scale_fmt") == "ue8m0" else None


def _read(parts: Parts, settings: Mapping[str, Any]) -> Float8Weight:
    ending = next(ending for ending in _SCALES if ending in parts.tensors)
    return float8(parts, "", ending, settings.get("weight_block_size"))


def float8(parts: Parts, codes: str, scales: str, block: Any = None) -> Float8Weight:
    """Return the weight of a tensor of codes and one of scales, E8M0 numbers included.

    Args:
        parts: The tensors.
        codes: Ending of the one of codes, ``[*experts, rows, columns]``.
        scales: Ending of the one of scales: a number, or one per expert, per row or per block.
        block: Rows and columns of a block, where the scales alone do not tell.
    """
    values, stored = parts[codes], parts[scales]
    if values.dtype != mx.uint8 or values.ndim < 2:
        raise parts.misshapen(codes, "a matrix of FP8 numbers")
    factors = scale_values(stored)
    if factors.ndim < values.ndim:
        factors = _unsqueezed(factors, values)
    rows, columns = values.shape[-2:]
    shape = factors.shape[-2:]
    sizes = tuple(int(size) for size in block) if block else (-(-rows // shape[0]), -(-columns // shape[1]))
    for candidate in (sizes, (rows, columns), (1, columns)):
        if shape == (-(-rows // candidate[0]), -(-columns // candidate[1])) and factors.ndim == values.ndim:
            lead = values.shape[:-2]
            return Float8Weight(values, mx.broadcast_to(factors, (*lead, *shape)), (candidate[0], candidate[1]))
    raise parts.misshapen(scales, f"a scale per block of {sizes[0]} x {sizes[1]} of shape {values.shape}")


def scale_values(stored: mx.array) -> mx.array:
    """Return scales as float32; bytes are E8M0 numbers."""
    if stored.dtype != mx.uint8:
        return stored.astype(mx.float32)
    exponents = stored.astype(mx.uint32)
    return mx.where(exponents == 0, mx.array(_LEAST, mx.uint32), exponents << _MANTISSA_BITS).view(mx.float32)


def _unsqueezed(factors: mx.array, values: mx.array) -> mx.array:
    """Give scales of a tensor, of experts or of rows the axes that they lack."""
    if factors.size == 1:
        return factors.reshape((1,) * values.ndim)
    leading = values.shape[: factors.ndim]
    if values.ndim > 2 and factors.shape == leading:
        return factors.reshape(*factors.shape, *(1,) * (values.ndim - factors.ndim))
    return factors[..., None]


FP8 = Format(("",), _SCALES, (), "", _read, _kept, _check)
