"""compressed-tensors checkpoints (LLM Compressor): packed and plain integers, FP8, mxfp8, mxfp4 and nvfp4.

What a weight is, its tensors and its group in ``config_groups`` tell; the layers that ``ignore`` names have none.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import UInt8

from metal_models.errors import MetalModelsError
from metal_models.weights.bits import unpack_padded
from metal_models.weights.fp8 import float8, scale_values
from metal_models.weights.parts import Format, MLXForm, Parts
from metal_models.weights.stored import Float4Weight, IntegerWeight, StoredWeight

_REFUSED_FORMATS = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask")


def _check(settings: Mapping[str, Any]) -> None:
    formats = [settings.get("format"), *(group.get("format") for group in _groups(settings))]
    refused = [form for form in formats if form in _REFUSED_FORMATS]
    if refused:
        raise MetalModelsError(
            f"[load] expected dense weights, got compressed-tensors format {refused[0]}, which leaves zeros out. "
            "Use another quantisation of the model."
        )
    transforms = settings.get("transform_config") or {}
    if transforms.get("config_groups"):
        raise MetalModelsError(
            "[load] expected weights that are used as they are, got compressed-tensors with transform_config, whose "
            "rotations the model's code would have to apply. Use another quantisation of the model."
        )


def _groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for group in (settings.get("config_groups") or {}).values():
        if isinstance(group, Mapping):
            yield group


def _scheme(module: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a module's weight: of the group that names it, else of the one for its class."""
    by_class: Mapping[str, Any] = {}
    for group in _groups(settings):
        for target in group.get("targets") or ():
            if _names(target, module):
                return group.get("weights") or {}
            if "." not in target and not target.startswith("re:"):
                by_class = by_class or group.get("weights") or {}
    return by_class


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return module == target or module.endswith(f".{target}")


def _kept(module: str, settings: Mapping[str, Any]) -> MLXForm | None:
    scheme = _scheme(module, settings)
    bits, group_size = int(scheme.get("num_bits") or 4), int(scheme.get("group_size") or 0)
    if scheme.get("type", "int") == "int":
        return None if scheme.get("actorder") == "group" else MLXForm.affine(bits, group_size)
    return {(4, 16): MLXForm(4, 16, "nvfp4"), (4, 32): MLXForm(4, 32, "mxfp4"), (8, 32): MLXForm(8, 32, "mxfp8")}.get(
        (bits, group_size)
    )


def _read(parts: Parts, settings: Mapping[str, Any]) -> StoredWeight:
    scheme = _scheme(parts.stem, settings)
    if parts.get(".weight_packed") is not None:
        return (
            _four_bit_floats(parts) if parts[".weight_packed"].dtype == mx.uint8 else _packed_integers(parts, scheme)
        )
    weight = parts[".weight"]
    if weight.dtype == mx.int8:
        codes = mx.bitwise_xor(weight.view(mx.uint8), mx.array(0x80, mx.uint8))
        zeros = parts.get(".weight_zero_point")
        return _integers(parts, codes, 8, None if zeros is None else zeros.astype(mx.float32) + 128)
    return float8(parts, ".weight", ".weight_scale", scheme.get("block_structure"))


def _packed_integers(parts: Parts, scheme: Mapping[str, Any]) -> IntegerWeight:
    words = parts[".weight_packed"]
    shape = parts.get(".weight_shape")
    if words.ndim != 2:
        raise parts.misshapen(".weight_packed", "a matrix of 32-bit words")
    bits = int(scheme.get("num_bits") or 4)
    held = words.shape[1] * (32 // bits)
    rows, columns = (words.shape[0], held) if shape is None else (int(size) for size in np.array(shape))
    if words.shape != (rows, -(-columns // (32 // bits))):
        raise parts.misshapen(".weight_packed", f"{rows} x {columns} codes of {bits} bits")
    zeros = None
    if (packed_zeros := parts.get(".weight_zero_point")) is not None:
        groups = parts[".weight_scale"].shape[-1]
        if packed_zeros.dtype == mx.int8:
            zeros = packed_zeros.astype(mx.float32) + (1 << (bits - 1))
        elif packed_zeros.shape != (-(-rows // (32 // bits)), groups):
            raise parts.misshapen(".weight_zero_point", f"{rows} x {groups} codes of {bits} bits")
        else:
            zeros = unpack_padded(packed_zeros.T, bits)[:, :rows].T.astype(mx.float32)
    return _integers(parts, unpack_padded(words, bits)[:, :columns], bits, zeros)


def _integers(
    parts: Parts, codes: UInt8[mx.array, "rows columns"], bits: int, zeros: mx.array | None
) -> IntegerWeight:
    """Return a weight of codes and zero points from 0; without zero points the middle code stands for 0."""
    rows, columns = codes.shape
    scales = parts[".weight_scale"]
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    if scales.shape[0] not in (1, rows) or scales.shape[1] > columns:
        raise parts.misshapen(".weight_scale", f"scales of {rows} rows or of all")
    scales = mx.broadcast_to(scales, (rows, scales.shape[1]))
    if zeros is None:
        zeros = mx.full(scales.shape, float(1 << (bits - 1)))
    elif zeros.size not in (1, rows, scales.size):
        raise parts.misshapen(".weight_zero_point", f"zero points as for scales of shape {scales.shape}")
    else:
        zeros = mx.broadcast_to(zeros if zeros.ndim == 2 else zeros.reshape(-1, 1), scales.shape)
    return IntegerWeight(codes, bits, scales, zeros, _column_groups(parts, columns, scales.shape[1]))


def _column_groups(parts: Parts, columns: int, groups: int) -> mx.array | None:
    """Return each column's group where activation order has mixed them; None where it has not."""
    found = parts.get(".weight_g_idx")
    if found is None:
        return None
    group_of = np.array(found)
    if group_of.shape != (columns,) or group_of.max() >= groups:
        raise parts.misshapen(".weight_g_idx", f"one of {groups} groups for each of {columns} columns")
    if group_of.min() < 0 or (group_of == np.arange(columns) // -(-columns // groups)).all():
        return None
    return mx.array(group_of.astype(np.int32))


def _four_bit_floats(parts: Parts) -> Float4Weight:
    """Return E2M1 numbers: with a global scale, which was multiplied into the scales, they are nvfp4."""
    codes, scales, factor = parts[".weight_packed"], parts[".weight_scale"], parts.get(".weight_global_scale")
    mode, width = ("mxfp4", 32) if factor is None else ("nvfp4", 16)
    if scales.dtype != mx.uint8 or codes.shape != (scales.shape[0], scales.shape[-1] * width // 2):
        raise parts.misshapen(".weight_scale", f"a byte for each {width} of {codes.shape[-1] * 2} columns ({mode})")
    return Float4Weight(codes, scales, mode, None if factor is None else 1 / scale_values(factor))


COMPRESSED_TENSORS = Format(
    (".weight_packed", ".weight"),
    (".weight_scale",),
    (".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale"),
    ".weight",
    _read,
    _kept,
    _check,
)
