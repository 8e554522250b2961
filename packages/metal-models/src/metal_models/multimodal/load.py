"""Loads the towers of a checkpoint; its language model is ``metal_models.load``'s."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from metal_models.checkpoint import check_files
from metal_models.errors import CheckpointError, MetalModelsError
from metal_models.multimodal.mlx_vlm_models import build, installed
from metal_models.multimodal.refused import REFUSED
from metal_models.multimodal.towers import Towers
from metal_models.stored_quantization import quantize_as_stored

# ``model_type`` -> module in ``families`` whose ``Family`` encodes for it; after a slash, that of its vision_config or
# its architecture.
FAMILIES = {
    "cohere2_vision": "cohere2_vision",
    "deepseek_vl_v2/DeepseekOCR2ForCausalLM": "deepseek_ocr2",
    "deepseek_vl_v2/DeepseekOCRForCausalLM": "deepseek_ocr",
    "dots_ocr": "dots_ocr",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "gemma4_unified": "gemma4_unified",
    "glm4v": "glm4v",
    "glm4v_moe": "glm4v_moe",
    "glm_ocr": "glm_ocr",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "internvl_chat": "internvl_chat",
    "kimi_vl": "kimi_vl",
    "lfm2_vl": "lfm2_vl",
    "lighton_ocr": "lighton_ocr",
    "llama4": "llama4",
    "llava": "llava",
    "llava/pixtral": "pixtral",
    "llava_next": "llava_next",
    "llava_next/siglip_vision_model": "granite_vision",
    "llava_onevision": "llava_onevision",
    "minicpmv4_6": "minicpmv4_6",
    "mistral3": "mistral3",
    "paddleocr_vl": "paddleocr_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_moe": "qwen3_vl",
    "qwen3_omni_moe": "qwen3_omni_moe",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "smolvlm": "idefics3",
}


@dataclass(frozen=True)
class TowerVerdict:
    """Whether a model's inputs other than text can be encoded; true if so.

    Attributes:
        modalities: What it takes: of ``image``, ``video`` and ``audio``.
        reason: One clause saying why it takes none.
        whole_items: Whether a step has to hold an item's rows together: see ``Towers.spans``.
    """

    modalities: frozenset[str]
    reason: str | None = None
    whole_items: bool = False

    def __bool__(self) -> bool:
        return bool(self.modalities)


def has_towers(config: dict[str, Any]) -> TowerVerdict:
    """Tell what a model with this ``config.json`` can take beside text; nothing is read, mlx-vlm is not imported."""
    family = _family(config)
    if family is None:
        kind = config.get("model_type")
        why = REFUSED.get(str(kind), "this version does not know it")
        return TowerVerdict(frozenset(), f"there is no encoder for {kind!r}: {why}")
    modalities = family.modalities_of(config)
    if not modalities:
        return TowerVerdict(frozenset(), "its config.json describes no encoder that is known")
    if not installed():
        return TowerVerdict(frozenset(), "mlx-vlm is not installed (metal-models[multimodal])")
    return TowerVerdict(modalities, whole_items=bool(family.bidirectional_of(config)))


def load_towers(path: str | Path, config: dict[str, Any], *, dtype: mx.Dtype | None = None) -> Towers:
    """Load the towers of a checkpoint and evaluate their parameters; no other weights are read.

    Args:
        path: A directory of safetensors, as Hugging Face or mlx-vlm writes it.
        config: Its ``config.json``.
        dtype: Type to cast floating-point parameters to; by default they stay as stored.

    Raises:
        MetalModelsError: There are no towers for this model, or mlx-vlm is not installed.
        CheckpointError: A file or tensor of theirs is missing, too many or misshapen.
    """
    family = _family(config)
    if family is None:
        raise MetalModelsError(
            f"[towers] expected one of {', '.join(FAMILIES)}, got {config.get('model_type')!r}. "
            "Serve the language model alone."
        )
    model = build(family.package, family.vlm_config(config), family.sub_configs)
    parts = model.parts(family.part_names)
    family.adapt(parts, config)
    path = Path(path)
    check_files(path)
    weights: dict[str, Any] = {}
    for file in sorted(path.glob("model*.safetensors")):
        stored: Any = mx.load(str(file))
        weights.update(stored)
    try:
        own = {
            name: array
            for stored, array in model.sanitize(weights, family.renamers).items()
            if (name := family.tensor_name(stored)) and name.partition(".")[0] in family.part_names
        }
        quantization = config.get("quantization") or config.get("quantization_config") or {}
        quantize_as_stored(parts, own, quantization)
        parts.load_weights(list(own.items()), strict=True)
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"[towers] expected the encoders of {config['model_type']!r} in {path}, got: "
            f"{' '.join(str(error).split())[:300]}. Check that the files belong together, or serve the language model "
            "alone."
        ) from error
    if dtype is not None:
        parts.update(tree_map(lambda array: _cast(array, dtype), parts.parameters()))
    parts.eval()
    mx.eval(parts.parameters())
    return family({name: parts[name] for name in family.part_names if name in parts}, config)


def _family(config: dict[str, Any]) -> type[Towers] | None:
    kind, vision = config.get("model_type"), (config.get("vision_config") or {}).get("model_type")
    names = [FAMILIES.get(f"{kind}/{part}") for part in (vision, *(config.get("architectures") or ()))]
    name = next((name for name in names if name), FAMILIES.get(str(kind)))
    if name is None:
        return None
    family: type[Towers] = importlib.import_module(f"metal_models.multimodal.families.{name}").Family
    return family


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
