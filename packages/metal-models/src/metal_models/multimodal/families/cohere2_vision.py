"""Command A Vision: an image as crops of one size and the whole, smaller."""

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families import llava
from metal_models.multimodal.families.llava import pixels_of
from metal_models.multimodal.item import MultimodalItem


class Family(llava.Family):
    """Command A Vision's vision tower and projector."""

    package = "aya_vision"
    renamers = ("", "vision_tower")
    vision_types = frozenset({"siglip_vision_model"})

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all crops, one for each square of patches."""
        hidden = self.parts["vision_tower"](pixels_of(item, self.dtype), output_hidden_states=True)[0]
        rows: mx.array = self.parts["multi_modal_projector"](hidden)
        return rows.reshape(-1, rows.shape[-1])
