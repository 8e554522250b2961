"""Per-head projections of latent attention, multiplied once for all rows of a step."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear


def multiply_rows_together(model: nn.Module) -> int:
    """Replace modules of ``model``, in place, by ones that share their arrays; returns how many.

    mlx-lm's per-head projections take ``[batch, heads, length, size]``. In a step every row is a batch entry of
    length 1, for which they would read all weights once per row; the replacements read them once.
    """
    replaced = [
        (path, _KINDS[type(module)](module)) for path, module in model.named_modules() if type(module) in _KINDS
    ]
    if replaced:
        model.update_modules(tree_unflatten(replaced))
    return len(replaced)


def _share(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` everything that ``source`` has."""
    nn.Module.__init__(target)
    target.__dict__.update(vars(source))
    dict.update(target, source)


class _Rows(MultiLinear):
    def __init__(self, source: nn.Module) -> None:
        _share(source, self)

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        return _together(super().__call__, x, transpose)


class _QuantizedRows(QuantizedMultiLinear):
    def __init__(self, source: nn.Module) -> None:
        _share(source, self)

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        return _together(super().__call__, x, transpose)


_KINDS: dict[type, Any] = {MultiLinear: _Rows, QuantizedMultiLinear: _QuantizedRows}


def _together(multiply: Any, x: mx.array, transpose: bool) -> mx.array:
    """Let rows ``[tokens, heads, 1, size]`` take the length's place."""
    if x.ndim != 4 or x.shape[2] != 1 or x.shape[0] == 1:
        out: mx.array = multiply(x, transpose)
        return out
    folded: mx.array = multiply(x.swapaxes(0, 2), transpose)
    return folded.swapaxes(0, 2)
