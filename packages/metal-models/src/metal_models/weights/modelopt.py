"""NVIDIA ModelOpt's checkpoints: FP8 with a scale per tensor, and nvfp4."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from metal_models.errors import MetalModelsError
from metal_models.weights.fp8 import float8
from metal_models.weights.parts import Format, MLXForm, Parts
from metal_models.weights.stored import Float4Weight, StoredWeight

_ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")


def _check(settings: Mapping[str, Any]) -> None:
    named = settings.get("quantization", settings)
    if (algorithm := str(named.get("quant_algo"))) not in _ALGORITHMS:
        raise MetalModelsError(
            f"[load] expected ModelOpt weights of quant_algo {', '.join(_ALGORITHMS)}, got {algorithm}. "
            "Use another quantisation of the model."
        )


def _kept(_: str, settings: Mapping[str, Any]) -> MLXForm | None:
    named = settings.get("quantization", settings)
    return MLXForm(4, 16, "nvfp4") if named.get("quant_algo") == "NVFP4" else None


def _read(parts: Parts, settings: Mapping[str, Any]) -> StoredWeight:
    if (factor := parts.get(".weight_scale_2")) is None:
        return float8(parts, ".weight", ".weight_scale")
    codes, scales = parts[".weight"], parts[".weight_scale"]
    if codes.dtype != mx.uint8 or codes.shape != (scales.shape[0], scales.shape[-1] * 8):
        raise parts.misshapen(".weight", "two E2M1 numbers a byte, 16 for each of .weight_scale")
    return Float4Weight(codes, scales, "nvfp4", factor.astype(mx.float32))


MODELOPT = Format((".weight",), (".weight_scale",), (".weight_scale_2",), ".weight", _read, _kept, _check)
