"""Models of images or sound that mlx-lm has no file for, around a language model that it has one for."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.utils import _get_classes as mlx_lm_classes

from metal_models.config_names import reading_new_names

# ``model_type`` of a text_config that names no file of mlx-lm -> the one that computes the same, and what it wants.
_SAME: dict[str, dict[str, Any]] = {
    "dots_ocr": {"model_type": "qwen2"},
    "glm4v_moe_text": {"model_type": "glm4_moe", "use_qk_norm": False, "rope_scaling": None},
    "glm4v_text": {"model_type": "glm4", "attention_bias": True},
    "glm_ocr_text": {"model_type": "glm4", "attention_bias": False},
    "paddleocr_vl": {"model_type": "llama"},
    "paddleocr_vl_text": {"model_type": "llama"},
    "qwen3_5_text": {"model_type": "qwen3_5"},
    "qwen3_omni_moe_text": {"model_type": "qwen3_moe"},
}

# Where the language model's own config may be.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")

# Arguments of mlx-lm's that transformers has under other names.
_RENAMED = {"block_dim": "hidden_size", "block_ff_dim": "intermediate_size"}

# How the names of tensors that are no language model's begin, after "model." or "thinker.".
_ENCODERS = (
    "audio_tower.", "code2wav.", "connector.", "image_newline", "merger.", "mlp1.", "mlp_AR.",
    "multi_modal_projector.", "projector.", "qwen2_model.", "sam_model.", "talker.", "view_sep", "vision_encoder.",
    "vision_model.", "vision_projection.", "vision_tower.", "visual.", "vit_merger.",
)  # fmt: skip


@dataclass
class ModelArgs(BaseModelArgs):
    """Which model, and the config of the language model in it."""

    model_type: str
    text_config: dict[str, Any]

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        """Return the arguments, with all values of a text_config that says only what is special."""
        from transformers import CONFIG_MAPPING, AutoConfig

        own = params.get("thinker_config") or params
        text = dict(next((own[name] for name in _TEXT_CONFIGS if own.get(name)), own))
        kind = text.get("model_type") or ("deepseek_v2" if "language_config" in params else "llama")
        if kind in CONFIG_MAPPING and not kind.startswith("paddleocr"):  # whose own defaults are those of the whole
            defaults = AutoConfig.for_model(kind).to_dict()
            text = {name: value for name, value in defaults.items() if value is not None} | text
        text = _SAME.get(kind, {}) | text | {"model_type": _SAME.get(kind, text).get("model_type", kind)}
        text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
        if kind == "deepseek_v2" and not text["qk_nope_head_dim"] and not text["qk_rope_head_dim"]:
            text = _without_latents(text)
        if text.get("use_bias"):
            text["attention_bias"] = text["mlp_bias"] = True
        text |= {name: text[theirs] for name, theirs in _RENAMED.items() if name not in text and theirs in text}
        if "tie_word_embeddings" in params and "llm_config" not in params:
            text["tie_word_embeddings"] = params["tie_word_embeddings"]
        return cls(params["model_type"], text)


class Model(nn.Module):
    """The language model, with a checkpoint of the whole."""

    def __init__(self, args: ModelArgs) -> None:
        nn.Module.__init__(self)
        self.args = args
        self.model_type = args.model_type
        model_class, args_class = mlx_lm_classes(args.text_config)
        self.language_model: Any = model_class(reading_new_names(args_class).from_dict(args.text_config))

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Return logits."""
        logits: mx.array = self.language_model(inputs, cache=cache)
        return logits

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the language model's tensors, whatever the level that the checkpoint has them at."""
        own = {
            _language_name(name): array
            for name, array in weights.items()
            if not name.removeprefix("thinker.").removeprefix("model.").startswith(_ENCODERS)
        }
        if hasattr(self.language_model, "sanitize"):
            own = self.language_model.sanitize(own)
        return {f"language_model.{name}": array for name, array in own.items()}

    @property
    def layers(self) -> Any:
        """The language model's layers."""
        return self.language_model.layers

    @property
    def cast_predicate(self) -> Any:
        """Which parameters may be cast, by name."""
        return getattr(self.language_model, "cast_predicate", lambda name: True)

    def make_cache(self) -> Any:
        """Return the caches that the language model wants."""
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.language_model)


def _without_latents(text: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the first DeepSeek for one of the second without latents.

    Raises:
        NotImplementedError: It wants of its experts what the first one's do not have.
    """
    if text["norm_topk_prob"] or text["routed_scaling_factor"] != 1 or text["topk_method"] != "greedy":
        raise NotImplementedError("experts with normalised, scaled or grouped weights need latents")
    return text | {"model_type": "deepseek"}


def _language_name(name: str) -> str:
    """Return what the language model itself calls a tensor."""
    name = name.removeprefix("thinker.")
    for level in ("model.language_model.", "model.text_model."):
        if name.startswith(level):
            return "model." + name.removeprefix(level)
    return name.removeprefix("language_model.")
