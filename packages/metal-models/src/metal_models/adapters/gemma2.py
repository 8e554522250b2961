"""Gemma 2: attention scores are soft-capped before the softmax."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma2
from mlx_lm.models.gemma2 import ModelArgs

from metal_models.cache_view import CacheView

__all__ = ["Model", "ModelArgs"]


class Attention(gemma2.Attention):
    """Gemma 2's attention, with its cap handed to the paged cache."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]``."""
        output: mx.array
        if not isinstance(cache, CacheView):
            output = super().__call__(x, mask, cache)
            return output
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        queries = self.q_proj(x).reshape(heads).transpose(0, 2, 1, 3)
        keys = self.k_proj(x).reshape(heads).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(heads).transpose(0, 2, 1, 3)
        rope: Any = self.rope
        queries = rope(queries, offset=cache.offset)
        keys = rope(keys, offset=cache.offset)
        cache.update_and_fetch(keys, values)
        out = cache.attend(queries, scale=self.scale, mask=mask, soft_cap=self.attn_logit_softcapping)
        output = self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        return output


class Model(gemma2.Model):
    """mlx-lm's Gemma 2 with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.self_attn = Attention(args)
