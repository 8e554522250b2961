"""dots.ocr: pages of any resolution, as patches of which neighbours are merged."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families.qwen2_5_vl import patches
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import SMALL_TEXT, Towers


class Family(Towers):
    """dots.ocr's vision tower."""

    package = "dots_ocr"
    part_names = ("vision_tower",)
    sub_configs = ()

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config of the tower alone."""
        vision = config["vision_config"] | {"model_type": "dots_vit"}
        return {"model_type": cls.package, "text_config": SMALL_TEXT, "vision_config": vision}

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images."""
        return frozenset({"image"}) if config.get("vision_config") else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each merged patch."""
        rows: mx.array = self.parts["vision_tower"](*patches(item, self.dtype))
        return rows
