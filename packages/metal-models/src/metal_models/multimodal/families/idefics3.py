"""Idefics 3 and SmolVLM: an image as crops of one size and the whole, smaller."""

from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from metal_models.multimodal.families import llava
from metal_models.multimodal.families.llava import pixels_of
from metal_models.multimodal.item import MultimodalItem


class Family(llava.Family):
    """Idefics 3's vision tower and connector."""

    package = "idefics3"
    part_names = ("vision_model", "connector")
    renamers = ("", "vision_model")
    vision_types = frozenset({"idefics3", "idefics3_vision", "siglip_vision_model", "smolvlm_vision"})

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with the one name that mlx-vlm's tower accepts for all of them."""
        vision = config["vision_config"] | {"model_type": "idefics3"}
        return super().vlm_config(config) | {"vision_config": vision}

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Change nothing."""

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name without what is above all parts."""
        return name.removeprefix("model.")

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all crops; patches that are padding have no position."""
        pixels, size = pixels_of(item, self.dtype), self.config["vision_config"]["patch_size"]
        down, across = pixels.shape[1] // size, pixels.shape[2] // size
        mask = np.ones(pixels.shape[:3], np.int64)
        if "pixel_attention_mask" in item.data:
            mask = item.integers("pixel_attention_mask").reshape(mask.shape)
        squares = mask[:, : down * size, : across * size].reshape(-1, down, size, across, size)
        shown = squares.max(axis=(2, 4)) > 0
        hidden, *_ = self.parts["vision_model"](pixels, patch_attention_mask=mx.array(shown))
        rows: mx.array = self.parts["connector"](hidden.astype(self.dtype))
        return rows.reshape(-1, rows.shape[-1])
