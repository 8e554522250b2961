"""Kernels in place of a model's linear layers and experts, while its steps of few rows are traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import SwitchGLU

from metal_kernels import expert_linear, expert_silu_and_mul, head_linear, kernels, serves_experts, target
from metal_models.expert_feed_forward import ExpertFeedForward, stacked_weights
from metal_models.head_linear import HeadLinear
from metal_models.quantized_heads import linear_of_few_rows

# Model files whose experts of a row may be the same one several times.
_REPEATING = ("longcat_flash",)


@contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Let the linear layers and experts of ``model`` be kernels, where there are some for what they are given.

    While it lasts, they are instances of subclasses of their classes.
    """
    changed: list[tuple[Any, Any]] = []
    try:
        for module, cls in list(_served(model)):
            changed.append((module, type(module)))
            module.__class__ = cls
        yield
    finally:
        for module, cls in reversed(changed):  # one may be there under two names
            module.__class__ = cls


def _served(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    for _, module in model.named_modules():
        if type(module) in _LINEARS:
            yield module, _LINEARS[type(module)]
        elif isinstance(module, (MultiLinear, QuantizedMultiLinear)) and HeadLinear.possible(module):
            yield module, _heads(type(module))
        experts = module.get("switch_mlp", module.get("experts"))
        repeating = type(module).__module__.rpartition(".")[2].startswith(_REPEATING)
        if type(experts) is SwitchGLU and not repeating and ExpertFeedForward.known(experts):
            yield experts, _Experts


class _Linear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        out = linear_of_few_rows(self, x)
        return nn.Linear.__call__(self, x) if out is None else out


class _QuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        out = linear_of_few_rows(self, x)
        return nn.QuantizedLinear.__call__(self, x) if out is None else out


_LINEARS: dict[type, Any] = {nn.Linear: _Linear, nn.QuantizedLinear: _QuantizedLinear}


@cache
def _heads(cls: Any) -> Any:
    def call(self: Any, x: mx.array, transpose: bool = True) -> mx.array:
        if transpose and x.ndim == 4 and x.shape[2] == 1:
            weights = HeadLinear(self).weights
            rows = x.squeeze(2)
            linear = kernels.head_linear_kernel(target(), rows.dtype, weights, rows.shape[0])
            if isinstance(linear, kernels.Accepted):
                return head_linear(rows, weights)[:, :, None]
        out: mx.array = cls.__call__(self, x, transpose)
        return out

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


class _Experts(SwitchGLU):
    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        rows, ids = x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
        gate, up, down = (stacked_weights(layer) for layer in (self.gate_proj, self.up_proj, self.down_proj))
        served = target() == "cpu" or serves_experts(x.dtype, [gate, up, down], *ids.shape)
        if not served or rows.shape[0] != ids.shape[0]:
            return SwitchGLU.__call__(self, x, indices)
        ids = ids.astype(mx.int32)
        mixed = expert_linear(expert_silu_and_mul(rows, gate, up, ids), down, ids, mx.ones(ids.shape, mx.float32))
        return mixed.astype(x.dtype).reshape(*indices.shape, -1)
