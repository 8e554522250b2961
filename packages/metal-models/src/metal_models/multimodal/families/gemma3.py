"""Gemma 3: images of one size, cut into crops where they are long, whose embeddings see each other."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families.llava import pixels_of, with_vision_model
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import Towers


class Family(Towers):
    """Gemma 3's vision tower and projector."""

    package = "gemma3"
    part_names = ("vision_tower", "multi_modal_projector")
    renamers = ("vision_tower",)

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config with what mlx-vlm looks for in other places."""
        tokens = config.get("mm_tokens_per_image", 256)
        return config | {"text_config": config["text_config"] | {"mm_tokens_per_image": tokens}}

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name with the level that transformers 5 leaves out."""
        return with_vision_model(name)

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images, for the sizes that have a tower."""
        return frozenset({"image"}) if config.get("vision_config") else frozenset()

    @classmethod
    def bidirectional_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images."""
        return cls.modalities_of(config)

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all crops, the whole image first."""
        hidden = self.parts["vision_tower"](pixels_of(item, self.dtype))[0]
        rows: mx.array = self.parts["multi_modal_projector"](hidden)
        # The language model multiplies what it takes for embeddings of tokens by this, rounded likewise.
        scale = mx.array(rows.shape[-1] ** 0.5, mx.bfloat16).astype(mx.float32)
        return (rows.astype(mx.float32) / scale).astype(rows.dtype).reshape(-1, rows.shape[-1])
