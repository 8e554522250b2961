"""Qwen2.5-VL: patches of any resolution, attention in windows, positions in time and space."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.rope_grid import Grid, grid_positions
from metal_models.multimodal.towers import SMALL_TEXT, Towers

_FIELDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class Family(Towers):
    """Qwen2.5-VL's vision tower."""

    package = "qwen2_5_vl"
    part_names = ("vision_tower",)

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config of the tower alone, with the one name that mlx-vlm accepts."""
        vision = config["vision_config"] | {"model_type": cls.package}
        text = SMALL_TEXT | {"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}}
        return {"model_type": cls.package, "vision_config": vision, "text_config": text}

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name under which mlx-vlm has what older checkpoints keep at the top."""
        return name.replace("visual.", "vision_tower.", 1) if name.startswith("visual.") else name

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images and video."""
        return frozenset(_FIELDS) if config.get("vision_config") else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each merged patch."""
        out = self.parts["vision_tower"](*patches(item, self.dtype))
        rows: mx.array = out[0] if isinstance(out, tuple) else out
        return rows

    def rope_positions(
        self, token_ids: Int32[np.ndarray, "tokens"], items: Sequence[MultimodalItem]
    ) -> tuple[Int32[np.ndarray, "3 tokens"], int]:
        """Return coordinates in which an item is one grid; time goes on by seconds where the processor gives them."""
        return grid_positions(len(token_ids), [self._grid(item) for item in items])

    def _grid(self, item: MultimodalItem) -> Grid:
        times, height, width = grid_of(item, self.config)
        seconds = item.data.get("second_per_grid_ts") if item.modality == "video" else None
        if seconds is None:
            return Grid(item.offset, times, height, width)
        per_second = self.config["vision_config"].get("tokens_per_second", 1.0)
        return Grid(item.offset, times, height, width, float(np.array(seconds).item()) * per_second)


def patches(item: MultimodalItem, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Return an item's flattened patches and its grid ``[1, 3]``: times, rows and columns of patches."""
    pixels, grid = _FIELDS[item.modality]
    return item.array(pixels, dtype), mx.array(item.integers(grid).reshape(1, 3).astype(np.int32))


def grid_of(item: MultimodalItem, config: dict[str, Any]) -> tuple[int, int, int]:
    """Return the times, rows and columns of an item's embeddings."""
    times, rows, columns = item.integers(_FIELDS[item.modality][1]).reshape(3).tolist()
    merged = config["vision_config"].get("spatial_merge_size", 2)
    return times, rows // merged, columns // merged
