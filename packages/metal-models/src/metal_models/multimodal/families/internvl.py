"""InternVL: an image as crops of one size and the whole, smaller."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families import llava
from metal_models.multimodal.families.llava import pixels_of, set_gelu
from metal_models.multimodal.item import MultimodalItem


class Family(llava.Family):
    """InternVL's vision tower and projector, in transformers' form."""

    package = "internvl"
    renamers = ("", "vision_tower")
    vision_types = frozenset({"internvl_vision"})

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let all parts compute the exact GELU."""
        del config
        set_gelu(parts, "gelu")

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name without what is above all parts."""
        return name.removeprefix("model.")

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all crops, one for each square of patches."""
        hidden = self.parts["vision_tower"](pixels_of(item, self.dtype))[0][:, 1:]
        crops, patches, width = hidden.shape
        side, step = int(patches**0.5), round(1 / self.config.get("downsample_ratio", 0.5))
        squares = hidden.reshape(crops, side // step, step, side // step, step, width).transpose(0, 1, 3, 2, 4, 5)
        rows: mx.array = self.parts["multi_modal_projector"](squares.reshape(crops, -1, step * step * width))
        return rows.reshape(-1, rows.shape[-1])
