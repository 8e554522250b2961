"""Pixtral: images of any resolution, one row for each patch."""

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families import mistral3
from metal_models.multimodal.families.llava import pixels_of, selected
from metal_models.multimodal.item import MultimodalItem


class Family(mistral3.Family):
    """Pixtral's vision tower and projector, in transformers' form."""

    package = "pixtral"

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each patch, row by row."""
        *_, states = self.parts["vision_tower"](pixels_of(item, self.dtype), output_hidden_states=True)
        rows: mx.array = self.parts["multi_modal_projector"](selected(states, self.config, layer=-1, strategy="full"))
        return rows.reshape(-1, rows.shape[-1])
