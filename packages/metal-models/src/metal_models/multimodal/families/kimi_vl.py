"""Kimi-VL: patches of any resolution, of which neighbours are merged."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float

from metal_models.multimodal.families.llava import set_gelu, text_width
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.resized_grid import cubic, resized
from metal_models.multimodal.towers import SMALL_TEXT, Towers


class Family(Towers):
    """Kimi-VL's vision tower (MoonViT) and projector."""

    package = "kimi_vl"
    part_names = ("vision_tower", "multi_modal_projector")

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config of the tower alone, under mlx-vlm's names, and one layer of least size."""
        vision = config["vision_config"]
        text = SMALL_TEXT | {
            "model_type": "deepseek_v3", "hidden_size": text_width(config), "moe_intermediate_size": 8,
            "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
        }  # fmt: skip
        named = {
            "embed_dim": vision["hidden_size"],
            "depth": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
        }
        return config | {"text_config": text, "vision_config": vision | named}

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let the tower compute its own GELU, norms' epsilon and cubic places; mlx-vlm has others."""
        del config
        tower = parts.vision_tower
        set_gelu(tower, "gelu_pytorch_tanh")
        for _, module in tower.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        tower.patch_embed.pos_emb.__class__ = _Places

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images."""
        return frozenset({"image"}) if config.get("vision_config") else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each square of patches."""
        pixels = item.array("pixel_values", self.dtype).transpose(0, 2, 3, 1)
        grid = mx.array(item.integers("image_grid_hws").reshape(1, 2).astype(np.int32))
        rows: mx.array = self.parts["multi_modal_projector"](self.parts["vision_tower"](pixels, grid))
        return rows


class _Places(nn.Module):
    """Adds to the patches of one image what stands for their places."""

    weight: mx.array

    def __call__(
        self, patches: Float[mx.array, "patches width"], grid: mx.array, grid_shapes: Any = None
    ) -> Float[mx.array, "patches width"]:
        """Return the patches with their places.

        Args:
            patches: Row by row.
            grid: Height and width in patches, ``[1, 2]``.
            grid_shapes: Not used.
        """
        del grid_shapes
        height, width = np.array(grid).reshape(-1).tolist()
        places = resized(self.weight[None], height, width, cubic)
        return patches + places.reshape(height * width, -1).astype(patches.dtype)
