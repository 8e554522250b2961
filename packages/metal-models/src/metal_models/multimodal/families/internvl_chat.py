"""InternVL as OpenGVLab publishes it: an image as crops of one size and the whole, smaller; frames one by one."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from metal_models.multimodal.families.llava import pixels_of, set_gelu
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import SMALL_TEXT, Towers

_FIELDS = {"image": "pixel_values_flat", "video": "pixel_values_flat_video"}


class Family(Towers):
    """InternVL's vision tower and projector."""

    package = "internvl_chat"
    part_names = ("vision_model", "mlp1")
    renamers = ("vision_model",)

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with no more of the language model than its width."""
        small = SMALL_TEXT | {"hidden_size": config["llm_config"]["hidden_size"]}
        made = {name: value for name, value in config.items() if name != "llm_config"}
        return made | {"text_config": small, "vision_config": {"model_type": "intern_vit_6b"} | made["vision_config"]}

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let the tower compute the GELU that the config names, and the projector be one module."""
        set_gelu(parts.vision_model, config["vision_config"].get("hidden_act", "gelu"))
        parts.mlp1 = nn.Sequential(*parts.mlp1)

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name with the level of the projector's one module."""
        return name.replace("mlp1.", "mlp1.layers.", 1) if name.startswith("mlp1.") else name

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images and video, where the tower is InternViT."""
        vision = config.get("vision_config") or {}
        return frozenset(_FIELDS) if vision.get("model_type", "intern_vit_6b") == "intern_vit_6b" else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the rows of all crops or frames, one for each square of patches."""
        pixels = pixels_of(item, self.dtype, _FIELDS[item.modality])
        *_, layers = self.parts["vision_model"](pixels, output_hidden_states=True)
        hidden = layers[self.config.get("select_layer", -1)][:, 1:]
        crops, patches, width = hidden.shape
        side, step = int(patches**0.5), round(1 / self.config.get("downsample_ratio", 0.5))
        squares = hidden.reshape(crops, side // step, step, side // step, step, width)
        # The first version put the squares down one column after the other.
        order = (0, 3, 1, 2, 4, 5) if self.config.get("ps_version") == "v1" else (0, 1, 3, 2, 4, 5)
        rows: mx.array = self.parts["mlp1"](squares.transpose(order).reshape(crops, -1, step * step * width))
        return rows.reshape(-1, rows.shape[-1])
