"""Qwen3-Omni's thinker: patches of any resolution and sound, positions in time and space."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_models.errors import MetalModelsError
from metal_models.multimodal.families.qwen2_5_vl import grid_of, patches
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.rope_grid import Grid, grid_positions
from metal_models.multimodal.towers import SMALL_TEXT, Towers


class Family(Towers):
    """The thinker's vision and audio towers; what speaks is left out."""

    package = "qwen3_omni_moe"
    part_names = ("thinker", "vision_tower", "audio_tower")
    sub_configs = ()
    renamers = ("",)

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config of the towers, with language models of least size and nothing that speaks."""
        small = SMALL_TEXT | {
            "num_experts": 1, "num_experts_per_tok": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "moe_intermediate_size": 8, "rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]},
        }  # fmt: skip
        thinker = config["thinker_config"] | {"text_config": small}
        return {"thinker_config": thinker, "talker_config": {"text_config": small}, "enable_audio_output": False}

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Take the thinker's towers from it."""
        del config
        thinker = parts.pop("thinker")
        parts.vision_tower, parts.audio_tower = thinker.vision_tower, thinker.audio_tower

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name below the thinker; None for what is not its own."""
        own = name.removeprefix("thinker.")
        return own if own != name and own.startswith(("vision_tower.", "audio_tower.")) else None

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images, video and sound."""
        thinker = config.get("thinker_config") or {}
        known = thinker.get("vision_config") and thinker.get("audio_config")
        return frozenset({"image", "video", "audio"}) if known else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each merged patch and beside it its deepstack levels, or the rows of sound alone."""
        if item.modality == "audio":
            return self._heard(item)
        rows, levels = self.parts["vision_tower"](*patches(item, self.dtype))
        return mx.concatenate([rows, *levels], axis=1)

    def rope_positions(
        self, token_ids: Int32[np.ndarray, "tokens"], items: Sequence[MultimodalItem]
    ) -> tuple[Int32[np.ndarray, "3 tokens"], int]:
        """Return coordinates in which an image or video is one grid, whose time goes on by seconds; sound is text."""
        return grid_positions(len(token_ids), [self._grid(item) for item in items if item.modality != "audio"])

    def _grid(self, item: MultimodalItem) -> Grid:
        if "use_audio_in_video" in item.data and item.integers("use_audio_in_video").any():
            raise MetalModelsError(
                "[rope_positions] expected video without its sound, got use_audio_in_video. Give the sound beside it."
            )
        thinker = self.config["thinker_config"]
        seconds = float(np.array(item.data.get("second_per_grid_ts", 2.0)).item()) if item.modality == "video" else 1.0
        step = seconds * thinker.get("position_id_per_seconds", 25)
        return Grid(int(item.embed_positions[0]), *grid_of(item, thinker), step)

    def _heard(self, item: MultimodalItem) -> mx.array:
        length = int(item.integers("audio_feature_lengths").item())
        rows: mx.array = self.parts["audio_tower"](
            item.array("input_audio_features", self.dtype), mx.array([length], mx.int32)
        )
        levels = len(self.parts["vision_tower"].deepstack_visual_indexes)
        return mx.pad(rows.astype(self.dtype), [(0, 0), (0, levels * rows.shape[1])])
