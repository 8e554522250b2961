"""Mistral 3: images of any resolution, whose neighbouring patches are merged."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_models.errors import MetalModelsError
from metal_models.multimodal.families import llava
from metal_models.multimodal.families.llava import pixels_of, text_width
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import SMALL_TEXT


class Family(llava.Family):
    """Mistral 3's vision tower and projector."""

    package = "mistral3"
    renamers = ("", "vision_tower")
    vision_types = frozenset({"pixtral"})

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with no more of the language model than its width and epsilon."""
        kept = {"hidden_size": text_width(config), "rms_norm_eps": config["text_config"].get("rms_norm_eps", 1e-5)}
        vision = config["vision_config"]
        if vision.get("hidden_act", "silu") != "silu":
            raise MetalModelsError(
                f"[towers] expected hidden_act silu in vision_config, got {vision['hidden_act']}. "
                "Serve the language model alone."
            )
        rope = vision.get("rope_parameters") or {}
        theta = vision.get("rope_theta") or rope.get("rope_theta", 10000.0)
        return config | {
            "text_config": SMALL_TEXT | {"model_type": "mistral"} | kept,
            "vision_config": vision | {"rope_theta": theta},
        }

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Change nothing."""

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name as it is."""
        return name

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each square of patches, row by row."""
        pixels = pixels_of(item, self.dtype)
        *_, states = self.parts["vision_tower"](pixels, output_hidden_states=True)
        projector, size = self.parts["multi_modal_projector"], self.config["vision_config"]["patch_size"]
        layers = self.config.get("vision_feature_layer", -1)
        chosen = [states[layer][0] for layer in (layers if isinstance(layers, list) else [layers])]
        merged = self.config.get("spatial_merge_size", 2)
        hidden = projector.norm(mx.concatenate(chosen, axis=-1))
        down, across = pixels.shape[1] // size // merged, pixels.shape[2] // size // merged
        squares = hidden.reshape(down, merged, across, merged, -1).transpose(0, 2, 4, 1, 3).reshape(down * across, -1)
        merged_rows = projector.patch_merger.merging_layer(squares)
        rows: mx.array = projector.linear_2(projector.gelu(projector.linear_1(merged_rows)))
        return rows
