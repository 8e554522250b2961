"""Makes the layers of a model quantised that its checkpoint has scales for."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def quantize_as_stored(module: nn.Module, tensors: Mapping[str, mx.array], quantization: Mapping[str, Any]) -> None:
    """Replace layers of ``module``, whose weights are not loaded yet.

    Args:
        module: The model.
        tensors: Of the checkpoint, under the model's names.
        quantization: MLX's entry in a ``config.json``: the common form, and by name those of layers with their own.
    """
    common = {name: quantization[name] for name in ("group_size", "bits", "mode") if name in quantization}

    def form(name: str, layer: nn.Module) -> bool | dict[str, Any]:
        if f"{name}.scales" not in tensors or not hasattr(layer, "to_quantized"):
            return False
        own = quantization.get(name)
        return {**common, **own} if isinstance(own, dict) else common

    nn.quantize(module, class_predicate=form)
