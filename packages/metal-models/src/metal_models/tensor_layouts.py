"""Gives mlx-lm's model files the tensors of checkpoints that name them or lay them out in another way."""

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Weights = dict[str, mx.array]


def reading_other_layouts(model_class: type[nn.Module]) -> type[nn.Module]:
    """Return a model class whose ``sanitize`` also takes what other writers of the same architecture make."""
    if model_class.__module__.rpartition(".")[2] not in _READERS:
        return model_class
    reading: type[nn.Module] = _reading(model_class)
    return reading


@cache
def _reading(model_class: Any) -> Any:
    read = _READERS[model_class.__module__.rpartition(".")[2]]

    def sanitize(self: Any, weights: Weights) -> Weights:
        own: Weights = model_class.sanitize(self, read(weights))
        return own

    return type(model_class.__name__, (model_class,), {"sanitize": sanitize, "__module__": model_class.__module__})


def _gpt2(weights: Weights) -> Weights:
    """Drop the backbone's name, which the first checkpoints do not have, buffers, and the copy of the embedding."""
    named = {name.removeprefix("transformer."): array for name, array in weights.items()}
    return {
        name: array for name, array in named.items() if name != "lm_head.weight" and ".attn.masked_bias" not in name
    }


def _gpt_oss(weights: Weights) -> Weights:
    """Take experts as floats: ``[experts, in, out]``, gate and up taking turns along the last axis."""
    if not any(name.endswith("experts.gate_up_proj") for name in weights):
        return weights
    read: Weights = {}
    for name, array in weights.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            read[f"{stem}.gate_proj.weight"] = array[..., ::2].swapaxes(-1, -2)
            read[f"{stem}.up_proj.weight"] = array[..., 1::2].swapaxes(-1, -2)
        elif last == "gate_up_proj_bias":
            read[f"{stem}.gate_proj.bias"], read[f"{stem}.up_proj.bias"] = array[..., ::2], array[..., 1::2]
        elif last == "down_proj" and stem.endswith("experts"):
            read[f"{name}.weight"] = array.swapaxes(-1, -2)
        elif last == "down_proj_bias":
            read[f"{stem}.down_proj.bias"] = array
        else:
            read[name] = array
    return read


def _olmo_hybrid(weights: Weights) -> Weights:
    """Take the norms of recurrent layers by the names that the first checkpoints have."""
    names = {"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"}
    read: Weights = {}
    for name, array in weights.items():
        stem, _, norm = name.removesuffix(".weight").rpartition(".")
        read[f"{stem}.{names[norm]}.weight" if norm in names else name] = array
    return read


# mlx-lm's model file -> what turns other layouts into the one that it expects.
_READERS: dict[str, Callable[[Weights], Weights]] = {
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "olmo_hybrid": _olmo_hybrid,
}
