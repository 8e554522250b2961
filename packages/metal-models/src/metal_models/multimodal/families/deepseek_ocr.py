"""DeepSeek-OCR: a page as crops of one size, line by line, and the whole, each seen by SAM and then by CLIP."""

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from metal_models.errors import MetalModelsError
from metal_models.multimodal.families.llava import pixels_of, set_gelu
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.resized_grid import antialiased
from metal_models.multimodal.sam_encoder import any_size
from metal_models.multimodal.towers import SMALL_TEXT, Towers


class Family(Towers):
    """DeepSeek-OCR's two encoders and projector, and the rows that end a line and an image."""

    package = "deepseekocr"
    part_names: ClassVar[tuple[str, ...]] = (
        "sam_model",
        "vision_model",
        "projector",
        "image_newline",
        "view_separator",
    )
    sub_configs = ()
    renamers = ("", "vision_model")

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config of the towers alone, with CLIP's sizes where mlx-vlm looks for them."""
        clip = config["vision_config"]["width"]["clip-l-14-224"]
        vision = {
            "model_type": "vision", "layers": clip["layers"], "hidden_size": clip["width"],
            "intermediate_size": 4 * clip["width"], "num_attention_heads": clip["heads"],
            "image_size": clip["image_size"], "patch_size": clip["patch_size"], "layer_norm_eps": 1e-5,
        }  # fmt: skip
        return small_config(config) | {"vision_config": vision}

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let the encoders have the config's sizes, take images of other ones, and compute CLIP's GELU."""
        parts.sam_model = sized(parts.sam_model, config)
        set_gelu(parts.vision_model, "quick_gelu")
        parts.vision_model.embeddings.__class__ = _Places

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images."""
        return frozenset({"image"}) if config.get("vision_config") else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the lines of the crops, those of the whole page, and the row that ends an image."""
        across, down = item.integers("images_spatial_crop").reshape(2).tolist()
        whole = self._lines(self._seen(pixels_of(item, self.dtype)), 1, 1)
        end = self.parts["view_separator"][None].astype(whole.dtype)
        if across * down == 1:
            return mx.concatenate([whole, end])
        crops = self._seen(pixels_of(item, self.dtype, "images_crop"))
        return mx.concatenate([self._lines(crops, down, across), whole, end])

    def _seen(self, pixels: mx.array) -> mx.array:
        """Return the rows of images ``[images, side, side, width]``."""
        first = self.parts["sam_model"](pixels)
        second = self.parts["vision_model"](pixels, first)[:, 1:]
        both = mx.concatenate([second.reshape(first.shape), first], axis=-1)
        rows: mx.array = self.parts["projector"].layers(both)
        return rows

    def _lines(self, crops: mx.array, down: int, across: int) -> mx.array:
        """Return the rows of crops that lie in a grid, each line with its end."""
        _, side, _, width = crops.shape
        grid = crops.reshape(down, across, side, side, width).transpose(0, 2, 1, 3, 4)
        lines = grid.reshape(down * side, across * side, width)
        end = mx.broadcast_to(self.parts["image_newline"].astype(crops.dtype), (down * side, 1, width))
        return mx.concatenate([lines, end], axis=1).reshape(-1, width)


def small_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with no more of the language model than mlx-vlm needs to make one.

    Raises:
        MetalModelsError: The projector is more than one linear layer.
    """
    projector = config["projector_config"]
    if projector["projector_type"] != "linear":
        raise MetalModelsError(
            f"[towers] expected projector_type linear, got {projector['projector_type']!r}. "
            "Serve the language model alone."
        )
    text = SMALL_TEXT | {
        "model_type": "deepseek_v2", "moe_intermediate_size": 8, "n_routed_experts": None, "n_shared_experts": None,
        "qk_nope_head_dim": 0, "qk_rope_head_dim": 0,
    }  # fmt: skip
    return {"model_type": "deepseekocr", "text_config": text, "projector_config": projector}


def sized(encoder: Any, config: dict[str, Any]) -> Any:
    """Return SAM's encoder with the config's sizes, for images of any; mlx-vlm's has those of its own config."""
    vision = config["vision_config"]
    sizes = vision["width"]["sam_vit_b"]
    made = type(encoder)(
        img_size=vision["image_size"],
        embed_dim=sizes["width"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        window_size=sizes.get("window_size", 14),
        global_attn_indexes=tuple(sizes["global_attn_indexes"]),
        final_out_chans=sizes["downsample_channels"][-1],
    )
    any_size(made)
    return made


class _Places(nn.Module):
    """Puts before an image's rows the one for the whole, and adds what stands for their places."""

    class_embedding: mx.array
    position_embedding: nn.Embedding

    def __call__(
        self, pixels: Float[mx.array, "images height pixels 3"], rows: Float[mx.array, "images down across width"]
    ) -> Float[mx.array, "images patches width"]:
        """Return the rows of images.

        Args:
            pixels: Not used.
            rows: What another encoder made of them.
        """
        del pixels
        count, down, across, width = rows.shape
        table = self.position_embedding.weight
        side = int((table.shape[0] - 1) ** 0.5)
        places = antialiased(table[1:].reshape(1, side, side, width), down, across).reshape(1, -1, width)
        first = mx.broadcast_to((self.class_embedding + table[0]).astype(rows.dtype), (count, 1, width))
        return mx.concatenate([first, rows.reshape(count, -1, width) + places.astype(rows.dtype)], axis=1)
