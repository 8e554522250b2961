"""Quantised output heads, for which MLX's CUDA backend reads all weights slowly where few rows meet them."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from metal_kernels import LinearWeights, fused_linear, kernels, target


def speed_up_heads(model: nn.Module) -> int:
    """Replace quantised embeddings and ``lm_head`` of ``model``, in place, by ones that share their arrays.

    Returns:
        How many were replaced: none where no kernel serves them.
    """
    if target() != "cuda":
        return 0
    replaced = [
        (path, _HEADS[type(module)](module))
        for path, module in model.named_modules()
        if type(module) is nn.QuantizedEmbedding
        or (type(module) is nn.QuantizedLinear and path.rpartition(".")[2] == "lm_head")
    ]
    if replaced:
        model.update_modules(tree_unflatten(replaced))
    return len(replaced)


def _share(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` everything that ``source`` has."""
    nn.Module.__init__(target)
    target.__dict__.update(vars(source))
    dict.update(target, source)


class _Embedding(nn.QuantizedEmbedding):
    def __init__(self, source: nn.Module) -> None:
        _share(source, self)

    def as_linear(self, x: mx.array) -> mx.array:
        logits = linear_of_few_rows(self, x)
        return nn.QuantizedEmbedding.as_linear(self, x) if logits is None else logits


class _Linear(nn.QuantizedLinear):
    def __init__(self, source: nn.Module) -> None:
        _share(source, self)

    def __call__(self, x: mx.array) -> mx.array:
        logits = linear_of_few_rows(self, x)
        return nn.QuantizedLinear.__call__(self, x) if logits is None else logits


_HEADS: dict[type, Any] = {nn.QuantizedEmbedding: _Embedding, nn.QuantizedLinear: _Linear}


def linear_of_few_rows(layer: Any, x: mx.array) -> mx.array | None:
    """Return the outputs of a linear layer, plain or quantised, from a kernel; None if none serves it."""
    if "scales" not in layer:
        weights = LinearWeights(layer.weight, bias=layer.get("bias"))
    elif layer.mode == "affine":
        options = {"bits": layer.bits, "group_size": layer.group_size}
        weights = LinearWeights(layer.weight, layer.scales, layer.biases, layer.get("bias"), **options)
    else:
        return None
    rows = x.reshape(-1, x.shape[-1])
    if not isinstance(kernels.linear_kernel(target(), x.dtype, weights, rows.shape[0]), kernels.Accepted):
        return None
    return fused_linear(rows, weights).reshape(*x.shape[:-1], -1)
