"""MiniCPM-V 4.6: an image as slices of any resolution and the whole, whose patches are merged within the tower."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int32

from metal_models.multimodal.families.llava import set_gelu, text_width
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import SMALL_TEXT, Towers

_PREFIXES = {"image": "", "video": "video_"}


class Family(Towers):
    """MiniCPM-V 4.6's vision tower and its two mergers."""

    package = "minicpmv4_6"
    part_names = ("vision_tower", "vit_merger", "merger")
    sub_configs = ()

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with no more of the language model than its width."""
        text = SMALL_TEXT | {"hidden_size": text_width(config)}
        vision = config["vision_config"] | {"model_type": "minicpmv4_6_vision"}
        return config | {"model_type": cls.package, "text_config": text, "vision_config": vision}

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let the last merger compute the exact GELU, and places be found as in the model's own code."""
        del config
        set_gelu(parts.merger, "gelu")
        parts.vision_tower.embeddings.__class__ = _Places

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images and video."""
        return frozenset(_PREFIXES) if config.get("vision_config") else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all slices, the whole image or frame first."""
        prefix = _PREFIXES[item.modality]
        sizes = item.integers(f"{prefix}tgt_sizes").reshape(-1, 2).tolist()
        pixels = item.array(f"{prefix}pixel_values", self.dtype)
        fewer = self.config.get("downsample_mode", "16x") != "4x"
        if f"{prefix}use_vit_merger" in item.data:
            fewer = bool(item.integers(f"{prefix}use_vit_merger").all())
        return mx.concatenate([self._slice(strip, size, fewer) for strip, size in zip(pixels, sizes, strict=True)])

    def _slice(self, strip: mx.array, size: list[int], fewer: bool) -> mx.array:
        """Return the rows of one slice, whose patches lie side by side ``[3, patch, patches × patch]``."""
        rows, columns = size
        tower, side = self.parts["vision_tower"], strip.shape[1]
        hidden = tower.embeddings(strip[:, :, : rows * columns * side].transpose(1, 2, 0)[None], rows, columns)
        for index, layer in enumerate(tower.encoder.layers):
            hidden = layer(hidden)
            if fewer and index == self.config.get("insert_layer_id", 6):
                merged, rows, columns = self.parts["vit_merger"](hidden[0], rows, columns)
                hidden = merged[None]
        found, *_ = self.parts["merger"](tower.post_layernorm(hidden)[0], rows, columns)
        return found  # type: ignore[no-any-return]


class _Places(nn.Module):
    """Makes rows of patches, with what stands for their places."""

    position_embedding: nn.Embedding

    def __call__(
        self, pixels: Float[mx.array, "1 patch pixels 3"], rows: int, columns: int
    ) -> Float[mx.array, "1 patches width"]:
        """Return the rows of an image's patches.

        Args:
            pixels: The patches side by side.
            rows: Of patches.
            columns: Of patches.
        """
        side = int(self.position_embedding.weight.shape[0] ** 0.5)
        places = _nearest(rows, side)[:, None] * side + _nearest(columns, side)
        embedded: mx.array = self.patch_embedding(pixels).flatten(1, 2)
        added: mx.array = self.position_embedding(mx.array(places.reshape(-1)))
        return embedded + added[None].astype(embedded.dtype)


def _nearest(lines: int, side: int) -> Int32[np.ndarray, "lines"]:
    """Return which of ``side`` lines over the same length each of ``lines`` begins in; rounded as PyTorch does."""
    begins = np.arange(lines, dtype=np.float32) / np.float32(lines)
    bounds = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    return np.searchsorted(bounds, begins, side="right").astype(np.int32)
