"""LLaVA: one size of images, seen by CLIP."""

from typing import Any, ClassVar

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import SMALL_TEXT, Towers


class Family(Towers):
    """LLaVA's vision tower and projector."""

    package = "llava"
    part_names = ("vision_tower", "multi_modal_projector")
    vision_types: ClassVar[frozenset[str]] = frozenset({"clip_vision_model"})

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with no more of the language model than its width."""
        width = {"hidden_size": text_width(config)}
        return config | {"text_config": SMALL_TEXT | width}

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return the name with the level that transformers 5 leaves out."""
        return with_vision_model(name)

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return images, where the tower is of a kind that mlx-vlm has in this family."""
        kind = (config.get("vision_config") or {}).get("model_type")
        return frozenset({"image"}) if kind in cls.vision_types else frozenset()

    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return one row for each patch, from the layers that the config selects."""
        *_, states = self.parts["vision_tower"](pixels_of(item, self.dtype), output_hidden_states=True)
        layers = self.config.get("vision_feature_layer", -2)
        first = 1 if self.config.get("vision_feature_select_strategy", "default") == "default" else 0
        chosen = [states[layer][:, first:] for layer in (layers if isinstance(layers, list) else [layers])]
        rows: mx.array = self.parts["multi_modal_projector"](mx.concatenate(chosen, axis=-1))
        return rows.reshape(-1, rows.shape[-1])


def pixels_of(item: MultimodalItem, dtype: mx.Dtype, name: str = "pixel_values") -> mx.array:
    """Return an item's images or crops, ``[crops, height, width, 3]``."""
    pixels = item.array(name, dtype)
    return pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)


def text_width(config: dict[str, Any]) -> int:
    """Return the language model's hidden size; a text_config may leave the default out."""
    from transformers import AutoConfig

    text = config["text_config"]
    return int(text.get("hidden_size") or AutoConfig.for_model(text["model_type"]).hidden_size)


def with_vision_model(name: str) -> str | None:
    """Return a tensor's name with the level that transformers 5 leaves out; None for a pooling head's."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return None if ".head." in name else name
