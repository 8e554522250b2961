"""LLaVA-OneVision: an image as crops of one size and the whole, smaller; frames at half the resolution."""

import math
from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families import llava_next
from metal_models.multimodal.families.llava import pixels_of, selected
from metal_models.multimodal.families.llava_next import crop_grid, patch_grid, unpadded
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.resized_grid import resized


class Family(llava_next.Family):
    """LLaVA-OneVision's vision tower and projector, and the row that ends a line."""

    package = "llava_onevision"
    renamers = ("", "vision_tower")
    vision_types = frozenset({"siglip_vision_model"})

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images and video."""
        return frozenset({"image", "video"}) if super().modalities_of(config) else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of the whole image and of the lines of its crops, or those of all frames."""
        name = "pixel_values_videos" if item.modality == "video" else "pixel_values"
        *_, states = self.parts["vision_tower"](pixels_of(item, self.dtype, name), output_hidden_states=True)
        crops: mx.array = self.parts["multi_modal_projector"](selected(states, self.config, layer=-1, strategy="full"))
        rows = self._frames(crops) if item.modality == "video" else self._crops(crops, item)
        return rows.astype(crops.dtype)

    def _frames(self, crops: mx.array) -> mx.array:
        count, patches, width = crops.shape
        side = int(patches**0.5)
        half = math.ceil(side / 2)
        grids = crops.reshape(count, side, side, width)
        return mx.concatenate([resized(grids, half, half).reshape(-1, width), self._line_end()[0]])

    def _crops(self, crops: mx.array, item: MultimodalItem) -> mx.array:
        count, patches, width = crops.shape
        if count == 1:
            return mx.concatenate([crops[0], self._line_end()[0]])
        side = int(patches**0.5)
        shown = unpadded(patch_grid(crop_grid(item, self.config), side), item.integers("image_sizes").reshape(2))
        lines = crops[1:].reshape(-1, width)[mx.array(shown)]
        most = int(self.config.get("vision_aspect_ratio", "anyres_max_9").removeprefix("anyres_max_"))
        ratio = math.sqrt(shown.size / (most * side**2))
        if ratio > 1.1:
            lines = resized(lines[None], int(shown.shape[0] // ratio), int(shown.shape[1] // ratio))[0]
        ends = mx.broadcast_to(self._line_end(), (lines.shape[0], 1, width))
        return mx.concatenate([crops[0], mx.concatenate([lines, ends], axis=1).reshape(-1, width)])

    def _line_end(self) -> mx.array:
        end: mx.array = self.parts["image_newline"]
        return end[None, None]
