"""Gemma 4 without towers: patches and stretches of sound go into the language model's space as they are."""

from typing import Any

import mlx.core as mx
import numpy as np

from metal_models.multimodal.families import gemma4
from metal_models.multimodal.item import MultimodalItem


class Family(gemma4.Family):
    """What maps Gemma 4's patches and sound into the language model's space."""

    package = "gemma4_unified"
    part_names = ("vision_embedder", "embed_vision", "embed_audio")
    renamers = ("",)

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config with the sizes of what becomes one row."""
        vision, audio = config["vision_config"], config.get("audio_config")
        size = vision["patch_size"] * vision["pooling_kernel_size"]
        stretch = audio and {"output_proj_dims": audio["audio_embed_dim"]} | audio
        return config | {"vision_config": {"model_patch_size": size} | vision, "audio_config": stretch}

    def _seen(self, item: MultimodalItem) -> mx.array:
        pixels, places = (item.array(name) for name in gemma4.FIELDS[item.modality])
        patches, spots = pixels.reshape(-1, pixels.shape[-1]), places.reshape(-1, 2)
        shown = mx.array(np.flatnonzero((np.array(spots) >= 0).any(axis=-1)).astype(np.int32))
        hidden = self.parts["vision_embedder"](patches[shown].astype(self.dtype), spots[shown])
        rows: mx.array = self.parts["embed_vision"](hidden)
        return rows

    def _heard(self, item: MultimodalItem) -> mx.array:
        features = item.array("input_features_padded", self.dtype)
        heard = np.flatnonzero(item.integers("input_features_mask").reshape(-1)).astype(np.int32)
        if len(heard) == item.num_embeds + 1:
            heard = heard[:-1]  # vLLM counts as for Gemma 4's tower, which hears no last stretch of up to 10 ms
        rows: mx.array = self.parts["embed_audio"](features.reshape(-1, features.shape[-1])[mx.array(heard)])
        return rows
