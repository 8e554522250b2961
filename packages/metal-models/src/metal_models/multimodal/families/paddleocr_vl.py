"""PaddleOCR-VL: pages of any resolution, as patches."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families import qwen2_5_vl
from metal_models.multimodal.families.qwen2_5_vl import patches
from metal_models.multimodal.item import MultimodalItem


class Family(qwen2_5_vl.Family):
    """PaddleOCR-VL's vision tower and projector."""

    package = "paddleocr_vl"
    part_names = ("visual",)
    renamers = ("", "visual")

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images."""
        return super().modalities_of(config) & {"image"}

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name as it is."""
        return name

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each merged patch."""
        pixels, grid = patches(item, self.dtype)
        rows: mx.array = self.parts["visual"](pixels[None], grid)
        return rows
