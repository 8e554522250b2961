"""Whether a checkpoint is served with its images, video and sound, or as its language model alone."""

import json
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_metal_plugin.envs import MetalEnvs
from vllm_metal_plugin.errors import UnsupportedConfigError

MODALITIES = ("image", "video", "audio")
COMPATIBLE = frozenset({"gemma4", "gemma4_unified", "qwen3_5", "qwen3_5_moe"})
"""``model_type`` of conditional-generation wrappers that ``auto`` serves as text where they have no towers here."""
_TOWER_CONFIGS = ("vision_config", "audio_config", "vision_tower_config", "vit_config")
_TOWER_TENSORS = ("vision", "visual", "vit", "audio", "siglip", "multi_modal_projector", "mm_projector", "sam_model")
_NEED_TORCHVISION = (
    "deepseek_vl_v2", "glm4v", "glm_ocr", "internvl_chat", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_5",
    "qwen3_omni", "qwen3_vl",
)  # fmt: skip
"""First letters of the ``model_type`` of wrappers whose code in vLLM imports torchvision, images or not."""
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Serving:
    """What a launch takes beside text.

    Attributes:
        modalities: Of ``image``, ``video`` and ``audio``; empty for text alone.
        reason: Why it is text alone, for a checkpoint that has more; None for others.
    """

    modalities: frozenset[str]
    reason: str | None = None


def serving(directory: str, envs: MetalEnvs, asked: Mapping[str, Any]) -> Serving:
    """Decide what to serve of a model directory, from its configuration and the headers of its weights.

    Args:
        directory: The model's.
        envs: The environment.
        asked: The user's limits of items per prompt, as ``limits`` returns them.

    Raises:
        UnsupportedConfigError: It has a vision or audio part that cannot be served, and nothing says that its language
            model alone will do.
    """
    path = Path(directory)
    config = _config(path)
    has_audio = bool(config.get("audio_config"))
    if not any(config.get(name) for name in _TOWER_CONFIGS):
        return Serving(frozenset())
    _check_torchvision(str(config.get("model_type")))
    if all(_count(asked.get(name)) == 0 for name in MODALITIES if name != "audio" or has_audio):
        return _text("--limit-mm-per-prompt allows nothing else")
    if envs.multimodal_mode == "text-only-compat":
        return _text("VLLM_METAL_MULTIMODAL_MODE=text-only-compat")
    modalities, reason = _modalities(path, config, envs)
    if reason is None:
        return Serving(modalities)
    if envs.multimodal_mode == "auto" and (
        config.get("model_type") in COMPATIBLE or not envs.use_paged_attention or not _holds_towers(path)
    ):
        return _text(reason)
    raise UnsupportedConfigError(
        f"[multimodal] expected a model whose images, video or sound can be served, got {config.get('model_type')!r}: "
        f"{reason}. Set VLLM_METAL_MULTIMODAL_MODE=text-only-compat to serve its language model alone."
    )


def limits(asked: Mapping[str, Any], modalities: Collection[str] = MODALITIES) -> dict[str, Any]:
    """Return vLLM's limits of items per prompt.

    One tower is for images and video: ``image: 0`` without a word on video turns both off.

    Args:
        asked: The user's (``--limit-mm-per-prompt``).
        modalities: What can be served.
    """
    allowed = dict(asked) | dict.fromkeys(set(MODALITIES) - set(modalities), 0)
    if _count(allowed.get("image")) == 0:
        allowed.setdefault("video", 0)
    return allowed


def _check_torchvision(model_type: str) -> None:
    if model_type.startswith(_NEED_TORCHVISION) and find_spec("torchvision") is None:
        raise UnsupportedConfigError(
            f"[multimodal] expected torchvision, which vLLM's code for {model_type!r} imports, got an environment "
            "without it. Install vllm-metal-plugin[multimodal]."
        )


def _text(reason: str) -> Serving:
    return Serving(frozenset(), reason)


def _modalities(path: Path, config: dict[str, Any], envs: MetalEnvs) -> tuple[frozenset[str], str | None]:
    """Return what can be taken beside text, or why nothing."""
    from metal_models.multimodal import has_towers

    if not envs.use_paged_attention:
        return frozenset(), "VLLM_METAL_USE_PAGED_ATTENTION=0 takes text only"
    verdict = has_towers(config)
    if not verdict:
        return frozenset(), verdict.reason
    if not _holds_towers(path):
        return frozenset(), "the checkpoint holds the language model alone"
    if not any((path / name).exists() for name in _PROCESSOR_FILES):
        return frozenset(), f"there is no {_PROCESSOR_FILES[0]} in {path}"
    return verdict.modalities, None


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        return {}
    config: dict[str, Any] = json.loads(file.read_text())
    return (config.get("thinker_config") or {}) | config  # models that speak, too, have them one level below


def _holds_towers(path: Path) -> bool:
    return any(word in name for name in _tensor_names(path) for word in _TOWER_TENSORS)


def _tensor_names(path: Path) -> Iterator[str]:
    for file in sorted(path.glob("model*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            yield from json.loads(stream.read(length))


def _count(limit: Any) -> int | None:
    """Return how many items a limit allows, in any of the forms that vLLM takes; None for any number."""
    if isinstance(limit, Mapping):
        limit = limit.get("count")
    return limit if limit is None or isinstance(limit, int) else int(limit.count)
