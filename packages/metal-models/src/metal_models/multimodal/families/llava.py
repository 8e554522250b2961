"""LLaVA: one size of images, seen by CLIP or SigLIP."""

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float
from mlx.utils import tree_unflatten

from metal_models.errors import MetalModelsError
from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.towers import SMALL_TEXT, Towers

# ``hidden_act`` of a tower -> how MLX calls that GELU; mlx-vlm has one of them in each of its towers.
_GELUS = {"gelu": "none", "gelu_new": "precise", "gelu_pytorch_tanh": "precise", "quick_gelu": "fast"}
_DEFAULT_ACTS = {"clip_vision_model": "quick_gelu", "siglip_vision_model": "gelu_pytorch_tanh"}


class Family(Towers):
    """LLaVA's vision tower and projector."""

    package = "llava"
    part_names: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    renamers: ClassVar[tuple[str, ...]] = ("vision_tower",)
    vision_types: ClassVar[frozenset[str]] = frozenset(_DEFAULT_ACTS)

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with no more of the language model than its width."""
        width = text_width(config)
        return config | {"text_config": SMALL_TEXT | {"hidden_size": width, "head_dim": width}}

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Let the tower compute the GELU that the config names, or its kind has."""
        vision = config["vision_config"]
        act = vision.get("hidden_act") or _DEFAULT_ACTS[vision["model_type"]]
        set_gelu(parts.vision_tower, act)

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
        rows: mx.array = self.parts["multi_modal_projector"](selected(states, self.config))
        return rows.reshape(-1, rows.shape[-1])


def selected(
    states: Sequence[mx.array], config: dict[str, Any], *, layer: int = -2, strategy: str = "default"
) -> Float[mx.array, "crops patches width"]:
    """Return a tower's rows from the layers that a config selects, side by side.

    Args:
        states: The input and the outputs of its layers.
        config: As in the model's ``config.json``.
        layer: Which one, where the config does not say.
        strategy: ``default`` leaves out the first row, which stands for the whole image; ``full`` does not. For a
            config that does not say.
    """
    layers = config.get("vision_feature_layer", layer)
    first = 1 if config.get("vision_feature_select_strategy", strategy) == "default" else 0
    chosen = [states[number][:, first:] for number in (layers if isinstance(layers, list) else [layers])]
    return mx.concatenate(chosen, axis=-1)


def set_gelu(tower: nn.Module, act: str) -> None:
    """Let a tower compute the GELU that a config names.

    Raises:
        MetalModelsError: The config names another function.
    """
    if act not in _GELUS:
        raise MetalModelsError(
            f"[towers] expected hidden_act of {', '.join(_GELUS)}, got {act!r}. Serve the language model alone."
        )
    own = [(name, nn.GELU(_GELUS[act])) for name, module in tower.named_modules() if isinstance(module, nn.GELU)]
    tower.update_modules(tree_unflatten(own))


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
