"""LFM2-VL: tiles of any resolution, as patches, of which neighbours are merged."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.families.llava import text_width
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import Towers


class Family(Towers):
    """LFM2-VL's vision tower and projector."""

    package = "lfm2_vl"
    part_names = ("vision_tower", "multi_modal_projector", "pixel_unshuffle")

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with no more of the language model than its width, and no layer left out."""
        text = {"model_type": "lfm2", "hidden_size": text_width(config), "vocab_size": 8, "num_hidden_layers": 1}
        return config | {"text_config": text | {"layer_types": ["full_attention"]}, "vision_feature_layer": -1}

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name without the level above all parts; None for a pooling head's."""
        own = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)
        return None if ".head." in own else own

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images."""
        return frozenset({"image"}) if config.get("vision_config") else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all tiles, the whole image last."""
        shapes = item.integers("spatial_shapes").reshape(-1, 2)
        pixels = item.array("pixel_values", self.dtype)
        pixels = pixels.reshape(len(shapes), -1, pixels.shape[-1])
        return mx.concatenate([self._tile(pixels[i], *shape) for i, shape in enumerate(shapes.tolist())])

    def _tile(self, pixels: mx.array, rows: int, columns: int) -> mx.array:
        """Return the rows of one tile; patches after its own are padding."""
        hidden = self.parts["vision_tower"](
            pixels[None, : rows * columns], spatial_shapes=mx.array([[rows, columns]])
        )[-1]
        squares = self.parts["pixel_unshuffle"](hidden.reshape(1, rows, columns, -1))
        merged: mx.array = self.parts["multi_modal_projector"](squares)
        return merged.reshape(-1, merged.shape[-1])
