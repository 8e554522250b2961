"""GPTQ's checkpoints (AutoGPTQ, GPTQModel): codes packed along a weight's columns, zero points along its rows."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from metal_models.errors import MetalModelsError
from metal_models.weights.bits import unpack
from metal_models.weights.parts import Format, MLXForm, Parts
from metal_models.weights.stored import IntegerWeight

_BITS = (2, 3, 4, 8)
# checkpoint_format -> what zero points are stored less than they are
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def _check(settings: Mapping[str, Any]) -> None:
    if (form := _checkpoint_format(settings)) not in _ZERO_OFFSETS:
        raise MetalModelsError(
            f"[load] expected GPTQ weights of checkpoint_format {' or '.join(_ZERO_OFFSETS)}, got {form}. "
            "Use another quantisation of the model."
        )


def _checkpoint_format(settings: Mapping[str, Any]) -> str:
    marlin = settings.get("is_marlin_format")
    return "marlin" if marlin else str(settings.get("checkpoint_format") or "gptq")


def _kept(_: str, settings: Mapping[str, Any]) -> MLXForm | None:
    mixed = settings.get("desc_act") and not settings.get("static_groups")
    return None if mixed else MLXForm.affine(int(settings.get("bits", 4)), settings.get("group_size", 128))


def _read(parts: Parts, settings: Mapping[str, Any]) -> IntegerWeight:
    scales, words, packed_zeros = parts[".scales"], parts[".qweight"], parts[".qzeros"]
    groups, rows = scales.shape
    bits = packed_zeros.shape[-1] * 32 // rows
    if bits not in _BITS or packed_zeros.shape != (groups, rows * bits // 32):
        raise parts.misshapen(".qzeros", f"{groups} x {rows} codes of 2, 3, 4 or 8 bits, as many as .scales has")
    if words.shape[-1] != rows or words.shape[0] * 32 % bits:
        raise parts.misshapen(".qweight", f"{rows} rows of {bits} bits, as .scales and .qzeros have")
    columns = words.shape[0] * 32 // bits
    zeros = (unpack(packed_zeros, bits) + _ZERO_OFFSETS[_checkpoint_format(settings)]) & ((1 << bits) - 1)
    return IntegerWeight(
        unpack(words.T, bits), bits, scales.T, zeros.T.astype(mx.float32), _column_groups(parts, columns, settings)
    )


def _column_groups(parts: Parts, columns: int, settings: Mapping[str, Any]) -> mx.array | None:
    """Return each column's group where activation order (``desc_act``) has mixed them; None where it has not."""
    found = parts.get(".g_idx")
    groups = parts[".scales"].shape[0]
    if found is None:
        return None
    if found.shape != (columns,):
        raise parts.misshapen(".g_idx", f"one group for each of {columns} columns")
    group_of = np.array(found)
    if (group_of == np.arange(columns) // -(-columns // groups)).all():
        return None
    if group_of.min() < 0 or group_of.max() >= groups:
        raise parts.misshapen(".g_idx", f"groups from 0 to {groups - 1}")
    return mx.array(group_of.astype(np.int32))


GPTQ = Format((".qweight",), (".scales",), (".qzeros", ".g_idx"), ".weight", _read, _kept, _check)
