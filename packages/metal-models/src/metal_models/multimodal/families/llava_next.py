"""LLaVA-NeXT: an image as crops of one size, row by row, and the whole, smaller."""

from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_models.multimodal.families import llava
from metal_models.multimodal.families.llava import pixels_of, selected
from metal_models.multimodal.item import MultimodalItem


class Family(llava.Family):
    """LLaVA-NeXT's vision tower and projector, and the row that ends a line."""

    package = "llava_next"
    part_names = ("vision_tower", "multi_modal_projector", "image_newline")
    vision_types = frozenset({"clip_vision_model"})

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of the whole image, then of the crops, line by line and without what pads them."""
        *_, states = self.parts["vision_tower"](pixels_of(item, self.dtype), output_hidden_states=True)
        crops: mx.array = self.parts["multi_modal_projector"](selected(states, self.config))
        count, patches, width = crops.shape
        rows = mx.concatenate([crops.reshape(-1, width), self.parts["image_newline"][None].astype(crops.dtype)])
        whole = np.arange(patches, dtype=np.int32)
        if count == 1:
            return rows[mx.array(whole)]
        grid = crop_grid(item, self.config)
        lines = unpadded(patches + patch_grid(grid, int(patches**0.5)), item.integers("image_sizes").reshape(2))
        ends = np.full((lines.shape[0], 1), count * patches, np.int32)
        return rows[mx.array(np.concatenate([whole, np.concatenate([lines, ends], axis=1).reshape(-1)]))]


def crop_grid(item: MultimodalItem, config: dict[str, Any]) -> tuple[int, int]:
    """Return how many rows and columns of crops an image was cut into: those that keep most of it and add least."""
    height, width = item.integers("image_sizes").reshape(2).tolist()

    def fit(size: list[int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - size[0] * size[1]

    best = max(config["image_grid_pinpoints"], key=fit)
    side = config["vision_config"]["image_size"]
    return best[0] // side, best[1] // side


def patch_grid(grid: tuple[int, int], side: int) -> Int32[np.ndarray, "rows columns"]:
    """Return the number of every patch of a grid of crops, of ``side`` by ``side`` patches each, where it lies."""
    down, across = grid
    numbers = np.arange(down * across * side * side, dtype=np.int32).reshape(down, across, side, side)
    return numbers.transpose(0, 2, 1, 3).reshape(down * side, across * side)


def unpadded(
    patches: Int32[np.ndarray, "rows columns"], size: np.ndarray
) -> Int32[np.ndarray, "kept_rows kept_columns"]:
    """Return the patches that show an image of some height and width; bars at two opposite sides do not."""
    rows, columns = patches.shape
    height, width = size.tolist()
    if width / height > columns / rows:
        bar = (rows - int(round(height * (columns / width), 7))) // 2
        return patches[bar : rows - bar]
    bar = (columns - int(round(width * (rows / height), 7))) // 2
    return patches[:, bar : columns - bar]
