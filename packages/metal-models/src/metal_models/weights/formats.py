"""Which format a checkpoint's quantised weights are in, by its ``quantization_config``."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_models.errors import MetalModelsError
from metal_models.weights.awq import AWQ
from metal_models.weights.compressed_tensors import COMPRESSED_TENSORS
from metal_models.weights.fp8 import FP8
from metal_models.weights.gptq import GPTQ
from metal_models.weights.modelopt import MODELOPT
from metal_models.weights.parts import Format

FORMATS: dict[str, Format] = {
    "awq": AWQ,
    "compressed-tensors": COMPRESSED_TENSORS,
    "fbgemm_fp8": FP8,
    "fp8": FP8,
    "gptq": GPTQ,
    "modelopt": MODELOPT,
    "modelopt_fp4": MODELOPT,
}
"""``quant_method`` -> format."""

NATIVE = ("bitnet", "mxfp4", "mxfp8")
"""Values of ``quant_method`` that mlx-lm loads itself, as it does its own ``quantization``."""

_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}

# Architectures whose code in mlx-lm reads the tensors of these formats itself.
_NATIVE_ARCHITECTURES = ("deepseek_v41", "deepseek_v41_text", "kimi_k3", "muse_spark")


@dataclass(frozen=True, eq=False)
class CheckpointFormat:
    """A format, and the settings of one checkpoint."""

    method: str
    format: Format
    settings: Mapping[str, Any]

    def leaves_out(self, module: str) -> bool:
        """Whether the settings name a module, as its model does in mlx-lm, among those with float weights."""
        if module.endswith("lm_head"):
            return not self.settings.get("lm_head", False)
        names = [*(self.settings.get("ignore") or ()), *(self.settings.get("modules_to_not_convert") or ())]
        named = module.replace(".switch_mlp.", ".experts.0.")
        return any(
            re.match(name.removeprefix("re:"), named) is not None
            if name.startswith("re:")
            else f".{name}." in f".{named}."
            for name in names
        )


def format_of(config: Mapping[str, Any], directory: Path | None = None) -> CheckpointFormat | None:
    """Return the format that a checkpoint's weights are converted from; None where mlx-lm loads them as they are.

    Args:
        config: As in ``config.json``.
        directory: Of the checkpoint, where ModelOpt may keep its settings in a file of their own.

    Raises:
        MetalModelsError: A format, or a variant of one, that is not known.
    """
    settings = _settings(config, directory)
    if settings is None or config.get("model_type") in _NATIVE_ARCHITECTURES or own_quantization(config):
        return None
    named = settings.get("quant_method") or ("modelopt" if "quantization" in settings else None)
    method = named if named is None else str(named).lower().replace("_tensors", "-tensors")
    if method in NATIVE or (method == "fp8" and _is_mxfp8(settings)):
        return None
    if method not in FORMATS:
        known = ", ".join(sorted((*FORMATS, *NATIVE)))
        raise MetalModelsError(
            f"[load] expected MLX's quantization or a quant_method of {known}, got {method!r} in config.json. "
            "Use another quantisation of the model, or the model without one."
        )
    form = FORMATS[method]
    form.check(settings)
    return CheckpointFormat(method, form, settings)


def own_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return mlx-lm's ``quantization`` where a config has it only as ``quantization_config`` of method ``mlx``."""
    settings = config.get("quantization_config")
    if config.get("quantization") or not isinstance(settings, Mapping):
        return None
    if settings.get("quant_method", "mlx") != "mlx" or not {"group_size", "bits"} <= settings.keys():
        return None
    return {name: value for name, value in settings.items() if name != "quant_method"}


def config_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    """Return what a model computes in, by its ``config.json``: bfloat16 where that does not say."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("torch_dtype", "dtype"):
            if (named := str(place.get(key)).removeprefix("torch.")) in _DTYPES:
                return _DTYPES[named]
    return mx.bfloat16


def _settings(config: Mapping[str, Any], directory: Path | None) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    texts = text if isinstance(text, Mapping) else {}
    if config.get("quantization") or texts.get("quantization"):
        return None
    places = (config, texts)
    keys = ("quantization_config", "compression_config")
    found = next((place[key] for place in places for key in keys if place.get(key)), None)
    if not found and directory is not None and (directory / "hf_quant_config.json").is_file():
        found = json.loads((directory / "hf_quant_config.json").read_text())
    return found if isinstance(found, Mapping) and found else None


def _is_mxfp8(settings: Mapping[str, Any]) -> bool:
    """Whether blocks and scales are those of mxfp8, which mlx-lm keeps."""
    return settings.get("scale_fmt") == "ue8m0" and list(settings.get("weight_block_size") or ()) == [32, 32]
