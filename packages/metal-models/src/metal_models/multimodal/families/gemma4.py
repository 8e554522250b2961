"""Gemma 4: images of several sizes, frames and sound; in larger models images see all of themselves."""

from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import Towers

FIELDS = {
    "image": ("pixel_values", "pixel_position_ids"),
    "video": ("pixel_values_videos", "pixel_position_ids_videos"),
}


class Family(Towers):
    """Gemma 4's towers, with what maps each into the language model's space."""

    package = "gemma4"
    part_names: ClassVar[tuple[str, ...]] = ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
    sub_configs = ("text", "vision", "audio")

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images and video, and sound where there is a tower for it."""
        seen = {"image", "video"} if config.get("vision_config") else set()
        heard = {"audio"} if config.get("audio_config") else set()
        return frozenset(seen | heard)

    @classmethod
    def bidirectional_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images and video, for sizes trained that way."""
        how = config.get("text_config", {}).get("use_bidirectional_attention")
        return frozenset({"image", "video"}) if how == "vision" else frozenset()

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config with the tower's rotary parameter where mlx-vlm looks for it."""
        vision = dict(config["vision_config"])
        rope = vision.get("rope_parameters") or {}
        vision["rope_parameters"] = rope.get("full_attention", rope) or None
        return config | {"vision_config": vision, "audio_config": config.get("audio_config")}

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all patches or frames that are no padding."""
        rows = self._heard(item) if item.modality == "audio" else self._seen(item)
        # The language model multiplies what it takes for embeddings of tokens by this, rounded to its own dtype.
        scale = mx.array(rows.shape[-1] ** 0.5, rows.dtype).astype(mx.float32)
        return (rows.astype(mx.float32) / scale).astype(rows.dtype)

    def _seen(self, item: MultimodalItem) -> mx.array:
        pixels, places = (item.array(name) for name in FIELDS[item.modality])
        pixels, places = (array[None] if array.ndim == 2 else array for array in (pixels, places))
        hidden = self.parts["vision_tower"](pixels, places.astype(mx.int32))
        rows: mx.array = self.parts["embed_vision"](hidden)[0]
        return rows

    def _heard(self, item: MultimodalItem) -> mx.array:
        padding = ~item.integers("input_features_mask").astype(bool).reshape(1, -1)
        features = item.array("input_features_padded", self.dtype).reshape(1, padding.size, -1)
        hidden, padded = self.parts["audio_tower"](features, mx.array(padding))
        kept = mx.array(np.flatnonzero(~np.array(padded[0])).astype(np.int32))
        rows: mx.array = self.parts["embed_audio"](hidden)[0][kept]
        return rows
