"""Baichuan M1: keys and values are mixed with those of the token before, which are a state beside the cache."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import baichuan_m1
from mlx_lm.models.baichuan_m1 import ModelArgs
from mlx_lm.models.base import scaled_dot_product_attention

__all__ = ["Model", "ModelArgs"]


class TokenBefore(nn.Module):
    """Gives every token the keys and values of the one before it; the first gets zeros."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __call__(self, keys: mx.array, values: mx.array, cache: Any = None) -> tuple[mx.array, mx.array]:
        """Shift ``[batch, length, heads, head_size]`` by one token; the last one goes to the cache."""
        rows = (keys, values)
        states = [None, None] if cache is None else [cache[0], cache[1]]
        before = [
            mx.concatenate([mx.zeros_like(row[:, :1]) if state is None else state, row[:, :-1]], axis=1)
            for row, state in zip(rows, states, strict=True)
        ]
        if cache is not None:
            cache[0], cache[1] = keys[:, -1:], values[:, -1:]
        return before[0], before[1]


class Attention(baichuan_m1.Attention):
    """Baichuan M1's attention with the shift in a module of its own."""

    def __init__(self, config: ModelArgs, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.token_before = TokenBefore()

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from ``[batch, length, hidden]``."""
        batch, length, width = x.shape
        shift_cache, kv_cache = (None, None) if cache is None else (cache[0], cache[1])
        bounds = [width, width + self.num_kv_heads * self.head_dim]
        queries, keys, values = (
            part.reshape(batch, length, -1, self.head_dim) for part in mx.split(self.W_pack(x), bounds, axis=-1)
        )
        keys_before, values_before = self.token_before(keys, values, shift_cache)
        keys = _mix(keys_before, keys, self.conv_k).transpose(0, 2, 1, 3)
        values = _mix(values_before, values, self.conv_v).transpose(0, 2, 1, 3)
        offset = 0 if kv_cache is None else kv_cache.offset
        queries = self.rope(queries.transpose(0, 2, 1, 3), offset=offset)
        keys = self.rope(keys, offset=offset)
        if kv_cache is not None:
            keys, values = kv_cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(queries, keys, values, cache=kv_cache, scale=self.scale, mask=mask)
        output: mx.array = self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        return output


def _mix(before: mx.array, rows: mx.array, weights: mx.array) -> mx.array:
    """Return the weighted sum, per head, of the rows before and the rows; weights are ``[1, 1, heads, 1, 2]``."""
    return before * weights[0, :, :, :, 0] + rows * weights[0, :, :, :, 1]


class Model(baichuan_m1.Model):
    """mlx-lm's Baichuan M1 with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = Attention(args, index)
