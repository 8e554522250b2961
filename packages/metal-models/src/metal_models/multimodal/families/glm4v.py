"""GLM-4.1V: patches of any resolution, frames one by one, positions in time and space."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int

from metal_models.multimodal.families import qwen3_vl
from metal_models.multimodal.families.qwen2_5_vl import patches
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.resized_grid import cubic, resized


class Family(qwen3_vl.Family):
    """GLM-4.1V's vision tower."""

    package = "glm4v"

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let positions be cubic in between; mlx-vlm has them linear, and nothing beyond the edges."""
        del config
        parts.vision_tower.embeddings.__class__ = _Positions

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each merged patch, frame by frame."""
        pixels, grid = patches(item, self.dtype)
        times, rows, columns = np.array(grid).reshape(-1).tolist()
        frame, tower = mx.array([[1, rows, columns]]), self.parts["vision_tower"]
        return mx.concatenate([tower(part, frame) for part in mx.split(pixels, times)])


class _Positions(nn.Module):
    """Adds to the patches of one image what stands for their places."""

    position_embedding: nn.Embedding

    def __call__(
        self,
        patches: Float[mx.array, "patches width"],
        lengths: list[int],
        grid: Int[mx.array, "1 3"],
        rows: Int[mx.array, "patches"],
        columns: Int[mx.array, "patches"],
    ) -> Float[mx.array, "patches width"]:
        """Return the patches with their places.

        Args:
            patches: In the order of ``rows`` and ``columns``.
            lengths: How many, for each image.
            grid: Its times, height and width in patches.
            rows: Where each lies.
            columns: Where each lies.
        """
        table = self.position_embedding.weight
        side = int(table.shape[0] ** 0.5)
        _, height, width = np.array(grid).reshape(-1).tolist()
        places = resized(table.reshape(1, side, side, -1), height, width, cubic)[0]
        return patches + places[rows, columns].astype(patches.dtype)
