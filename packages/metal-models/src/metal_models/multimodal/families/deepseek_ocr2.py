"""DeepSeek-OCR 2: a page as crops of one size and the whole, each seen by SAM and read by queries of a small Qwen2."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families import deepseek_ocr
from metal_models.multimodal.families.deepseek_ocr import sized, small_config
from metal_models.multimodal.families.llava import pixels_of
from metal_models.multimodal.item import MultimodalItem


class Family(deepseek_ocr.Family):
    """DeepSeek-OCR 2's two encoders and projector, and the row that ends an image."""

    package = "deepseekocr_2"
    part_names = ("sam_model", "vision_model", "projector", "view_separator")

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config of the towers alone."""
        return small_config(config) | {"vision_config": {"model_type": "vision"}}

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let the encoders have the config's sizes, and SAM take images of other ones."""
        parts.sam_model = sized(parts.sam_model, config)
        sizes = {"qwen2": config["vision_config"]["width"]["qwen2-0-5b"]}
        parts.vision_model = type(parts.vision_model)(SimpleNamespace(model_type="vision", params=sizes))

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of the crops, those of the whole page, and the row that ends an image."""
        rows = [self._seen(pixels_of(item, self.dtype)), self.parts["view_separator"][None].astype(self.dtype)]
        if item.integers("images_spatial_crop").prod() > 1:
            rows.insert(0, self._seen(pixels_of(item, self.dtype, "images_crop")))
        return mx.concatenate(rows)

    def _seen(self, pixels: mx.array) -> mx.array:
        """Return the rows of images ``[images, side, side, 3]``, one after the other."""
        read = self.parts["vision_model"](pixels, self.parts["sam_model"](pixels))
        rows: mx.array = self.parts["projector"](read)
        return rows.reshape(-1, rows.shape[-1])
