"""Llama 4: an image as crops of one size and the whole, smaller, with marks between them."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families.llava import set_gelu, text_width
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import SMALL_TEXT, Towers


class Family(Towers):
    """Llama 4's vision tower and projector."""

    package = "llama4"
    part_names = ("vision_model", "multi_modal_projector")
    renamers = ("vision_model",)

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with no more of the language model than its width."""
        small = SMALL_TEXT | {
            "hidden_size": text_width(config), "intermediate_size_mlp": 8, "num_local_experts": 1,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_bias": False, "use_qk_norm": False,
            "attention_chunk_size": 8, "rope_scaling": None,
        }  # fmt: skip
        vision = config["vision_config"]
        rope = vision.get("rope_parameters") or {}
        theta = vision.get("rope_theta") or rope.get("rope_theta", 10000.0)
        return config | {
            "text_config": small,
            "vision_config": {"vision_feature_layer": -1} | vision | {"rope_theta": theta},
        }

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let all parts compute the exact GELU."""
        del config
        set_gelu(parts, "gelu")

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name without what is above all parts."""
        return name.removeprefix("model.")

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images."""
        return frozenset({"image"}) if config.get("vision_config") else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all crops, the whole image last."""
        pixels = item.array("pixel_values", self.dtype)
        hidden = self.parts["vision_model"](pixels.reshape(-1, *pixels.shape[-3:]))
        rows: mx.array = self.parts["multi_modal_projector"](hidden)
        return rows.reshape(-1, rows.shape[-1])
