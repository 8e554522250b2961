"""Qwen3-VL: rows of the vision tower's inner layers are added to the language model's first ones (deepstack)."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_models.errors import MetalModelsError
from metal_models.multimodal.families import qwen2_5_vl
from metal_models.multimodal.families.qwen2_5_vl import grid_of, patches
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.rope_grid import Grid, grid_positions


class Family(qwen2_5_vl.Family):
    """Qwen3-VL's vision tower."""

    package = "qwen3_vl"

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each merged patch, and beside it what its deepstack levels add."""
        rows, levels = self.parts["vision_tower"](*patches(item, self.dtype))
        return mx.concatenate([rows, *levels], axis=1) if levels else rows

    def rope_positions(
        self, token_ids: Int32[np.ndarray, "tokens"], items: Sequence[MultimodalItem]
    ) -> tuple[Int32[np.ndarray, "3 tokens"], int]:
        """Return coordinates in which an image, and every frame of a video, is a grid of its own.

        The text between frames says when they are.
        """
        return grid_positions(len(token_ids), [grid for item in items for grid in self._frames(item)])

    def _frames(self, item: MultimodalItem) -> Iterator[Grid]:
        times, height, width = grid_of(item, self.config)
        cells = height * width
        embeds = item.embed_positions
        if len(embeds) != times * cells:
            raise MetalModelsError(
                f"[rope_positions] expected {times * cells} placeholders for a grid of {times} × {height} × {width}, "
                f"got {len(embeds)}. Prune no frames of videos."
            )
        for first in embeds[::cells]:
            yield Grid(int(first), 1, height, width)
