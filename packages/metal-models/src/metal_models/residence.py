"""In which form a loaded model's weights are held, and how they come into memory."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from metal_models.factored_linear import FactoredLinear, FactoredSwitchLinear

_FLOAT_CLASSES: dict[type, type] = {
    FactoredLinear: nn.Linear,
    FactoredSwitchLinear: SwitchLinear,
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
}


def nbytes(module: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(array.nbytes for _, array in _leaves(module))


def evaluate(module: nn.Module) -> None:
    """Compute the parameters one after the other: never more than one is there in two forms.

    What a file holds in another type, or packed otherwise, is dropped as soon as its parameter is there.
    """
    for _, array in _leaves(module):
        mx.eval(array)


def expanded_nbytes(module: nn.Module, dtype: mx.Dtype | None = None) -> int:
    """Return the bytes of all parameters once ``expand`` has been called."""
    total = nbytes(module)
    for _, layer in _quantized(module):
        total += layer.weight.size * 32 // layer.bits * _dtype_of(layer, dtype).size
        total -= sum(layer[name].nbytes for name in ("weight", "scales", "biases") if _is_array(layer, name))
    return total


def expand(module: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Hold quantised weights as floats, one after the other, in place.

    Args:
        module: A model, evaluated.
        dtype: Of weights whose scales are no floats; by default bfloat16.
    """
    pending = _quantized(module)
    while pending:
        path, layer = pending.pop()
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode,
            dtype=_dtype_of(layer, dtype),
        )  # fmt: skip
        if isinstance(layer, FactoredLinear | FactoredSwitchLinear):
            factor = layer.factor[..., None, None] if layer.factor.ndim else layer.factor
            weight = (weight.astype(mx.float32) * factor).astype(weight.dtype)
        mx.eval(weight)
        plain: Any = _FLOAT_CLASSES[type(layer)]
        replaced = plain.__new__(plain)
        nn.Module.__init__(replaced)
        replaced.weight = weight
        if "bias" in layer:
            replaced.bias = layer.bias
        replaced.train(layer.training)
        module.update_modules(tree_unflatten([(path, replaced)]))


def embed_in(module: nn.Module, dtype: mx.Dtype) -> None:
    """Let quantised embeddings return ``dtype``: those whose scales are bytes return bfloat16 by themselves."""
    for _, layer in module.named_modules():
        if type(layer) is nn.QuantizedEmbedding and layer.mode != "affine" and dtype != mx.bfloat16:
            layer.__class__ = _TypedEmbedding
            object.__setattr__(layer, "_dtype", dtype)


class _TypedEmbedding(nn.QuantizedEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        embed: Any = super().__call__
        rows: mx.array = embed(x)
        return rows.astype(self._dtype)


def _quantized(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers that ``expand`` replaces."""
    return [
        (path, layer)
        for path, layer in module.named_modules()
        if type(layer) in _FLOAT_CLASSES and not _is_array(layer, "global_scale")
    ]


def _dtype_of(layer: Any, dtype: mx.Dtype | None) -> mx.Dtype:
    """Return the type of activations, which the affine mode's scales have, too."""
    scales: mx.Dtype = layer.scales.dtype
    return scales if layer.mode == "affine" else dtype or mx.bfloat16


def _is_array(layer: Any, name: str) -> bool:
    return isinstance(layer.get(name), mx.array)


def _leaves(module: nn.Module) -> list[tuple[str, mx.array]]:
    leaves: Any = tree_flatten(module.parameters())
    return list(leaves)
