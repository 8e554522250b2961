"""AWQ's checkpoints (AutoAWQ, ``version: gemm``): 4-bit codes with zero points, packed along a weight's rows."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from jaxtyping import UInt8

from metal_models.errors import MetalModelsError
from metal_models.weights.bits import unpack
from metal_models.weights.parts import Format, MLXForm, Parts
from metal_models.weights.stored import IntegerWeight

_BITS = 4
# The eight codes of a word, low bits first, are those of the rows 0 2 4 6 1 3 5 7: where each row's code is.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def _check(settings: Mapping[str, Any]) -> None:
    version = str(settings.get("version", "gemm")).lower()
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    if version != "gemm" or bits != _BITS:
        raise MetalModelsError(
            f"[load] expected AWQ weights of version gemm with 4 bits, got version {version} with {bits}. "
            "Use another quantisation of the model."
        )


def _kept(_: str, settings: Mapping[str, Any]) -> MLXForm | None:
    return MLXForm.affine(_BITS, settings.get("group_size", settings.get("q_group_size", 128)))


def _read(parts: Parts, settings: Mapping[str, Any]) -> IntegerWeight:
    scales, words = parts[".scales"], parts[".qweight"]
    rows = scales.shape[-1]
    if words.shape[-1] * 8 != rows:
        raise parts.misshapen(".qweight", f"codes of {rows} rows, as many as .scales has")
    if parts[".qzeros"].shape != (scales.shape[0], rows // 8):
        raise parts.misshapen(".qzeros", f"shape {(scales.shape[0], rows // 8)}, as for .scales")
    zeros = _rows_of(parts[".qzeros"]).astype(mx.float32)
    return IntegerWeight(mx.contiguous(_rows_of(words)), _BITS, scales.T, zeros)


def _rows_of(words: mx.array) -> UInt8[mx.array, "rows columns"]:
    """Return ``[columns, rows / 8]`` words as codes by row."""
    codes = unpack(words, _BITS).reshape(words.shape[0], -1, 8)
    return codes[..., mx.array(_PLACES)].reshape(words.shape[0], -1).T


AWQ = Format((".qweight",), (".scales",), (".qzeros",), ".weight", _read, _kept, _check)
