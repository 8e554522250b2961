"""Per-head projections of latent attention, multiplied once for all rows of a step."""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

# Attention modules that, for rows of length 1, cache latents, absorb queries, attend and project values in this order.
_IN_ORDER = {f"mlx_lm.models.{name}" for name in ("deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash")}


def multiply_rows_together(model: nn.Module) -> int:
    """Replace modules of ``model``, in place, by ones that share their arrays; returns how many.

    mlx-lm's per-head projections take ``[batch, heads, length, size]``. In a step every row is a batch entry of
    length 1, for which they would read all weights once per row; the replacements read them once. Where a layer's
    attention asks for it (``PENDING``), they leave the product to it.
    """
    replaced = [
        (path, _KINDS[type(module)](module)) for path, module in model.named_modules() if type(module) in _KINDS
    ]
    if replaced:
        model.update_modules(tree_unflatten(replaced))
        for _, parent in model.named_modules():
            pair: tuple[Any, Any] = (getattr(parent, "embed_q", None), getattr(parent, "unembed_out", None))
            if type(parent).__module__ in _IN_ORDER and all(isinstance(part, _LeavesProducts) for part in pair):
                for part in pair:
                    part.layer = HeadProjections(*pair)
    return len(replaced)


class HeadProjections:
    """One layer's projections for attention over latents; see ``metal_kernels.LatentProjections``.

    Args:
        embed_q: Takes queries to latents, and latents to keys.
        unembed_out: Takes latents to values.
    """

    def __init__(self, embed_q: Any, unembed_out: Any) -> None:
        self.embed_q = embed_q
        self.unembed_out = unembed_out

    @property
    def value_size(self) -> int:
        """Elements of a value."""
        return int(self.unembed_out.weight.shape[1])

    def absorb(self, query: mx.array) -> mx.array:
        """Return queries ``[tokens, heads, latent]`` of ``[tokens, heads, size]``."""
        return self.embed_q.multiply(query[:, :, None], True).squeeze(2)  # type: ignore[no-any-return]

    def unabsorb(self, weighted: mx.array) -> mx.array:
        """Return values ``[tokens, heads, size]`` of weighted latents ``[tokens, heads, latent]``."""
        return self.unembed_out.multiply(weighted[:, :, None], True).squeeze(2)  # type: ignore[no-any-return]

    def expand(self, latent: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values ``[heads, keys, size]`` of latents ``[keys, latent]``."""
        rows = latent[None, None]
        return self.embed_q.multiply(rows, False).squeeze(0), self.unembed_out.multiply(rows, True).squeeze(0)


class PendingProduct:
    """Products that attention takes over: those of the next layer that projects queries, after it asked.

    A layer caches its latents, projects queries, attends, and projects the result. Its cache asks before the queries
    are projected, attention takes the layer's projections, and both modules return what they are given.
    """

    def __init__(self) -> None:
        self._asked = False
        self._left: HeadProjections | None = None
        self._result_of: Any = None

    def ask(self) -> None:
        """Leave the products of the layer that projects queries next to its attention."""
        self._asked = True

    def take(self) -> HeadProjections | None:
        """Return the projections of the layer under way, if it left them: its result has to be projected."""
        left, self._left, self._asked = self._left, None, False
        self._result_of = None if left is None else left.unembed_out
        return left

    def drop(self) -> None:
        """Forget what was asked: the step is over."""
        self._asked, self._left, self._result_of = False, None, None

    def leaves(self, module: Any) -> bool:
        """Whether ``module`` is to return what it is given."""
        if module is self._result_of:
            self._result_of = None
            return True
        if not self._asked or module.layer is None or module is not module.layer.embed_q:
            return False
        self._asked, self._left = False, module.layer
        return True


PENDING = PendingProduct()
"""Of the model under way."""


def _share(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` everything that ``source`` has."""
    nn.Module.__init__(target)
    target.__dict__.update(vars(source))
    dict.update(target, source)


class _LeavesProducts:
    layer: HeadProjections | None = None

    def multiply(self, x: mx.array, transpose: bool) -> mx.array:
        """Return the product, whoever asked for it."""
        raise NotImplementedError

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """Return the product, or what is given where attention takes the product over."""
        return x if transpose and PENDING.leaves(self) else self.multiply(x, transpose)


class _Rows(_LeavesProducts, MultiLinear):
    def __init__(self, source: nn.Module) -> None:
        _share(source, self)

    def multiply(self, x: mx.array, transpose: bool) -> mx.array:
        return _together(partial(MultiLinear.__call__, self), x, transpose)


class _QuantizedRows(_LeavesProducts, QuantizedMultiLinear):
    def __init__(self, source: nn.Module) -> None:
        _share(source, self)

    def multiply(self, x: mx.array, transpose: bool) -> mx.array:
        return _together(partial(QuantizedMultiLinear.__call__, self), x, transpose)


_KINDS: dict[type, Any] = {MultiLinear: _Rows, QuantizedMultiLinear: _QuantizedRows}


def _together(multiply: Any, x: mx.array, transpose: bool) -> mx.array:
    """Let rows ``[tokens, heads, 1, size]`` take the length's place."""
    if x.ndim != 4 or x.shape[2] != 1 or x.shape[0] == 1:
        out: mx.array = multiply(x, transpose)
        return out
    folded: mx.array = multiply(x.swapaxes(0, 2), transpose)
    return folded.swapaxes(0, 2)
