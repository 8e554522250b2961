"""Gear: attention scores may be soft-capped before the softmax."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import gear
from mlx_lm.models.gear import ModelArgs

from metal_models.cache_view import CacheView

__all__ = ["Model", "ModelArgs"]


class Attention(gear.Attention):
    """Gear's attention, with its cap handed to the paged cache."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]``."""
        output: mx.array
        if not isinstance(cache, CacheView):
            output = super().__call__(x, mask, cache)
            return output
        tokens = x.shape[0]
        queries = self.q_norm(self.q_proj(x).reshape(tokens, self.n_heads, 1, self.head_dim))
        keys = self.k_norm(self.k_proj(x).reshape(tokens, self.n_kv_heads, 1, self.head_dim))
        values = self.v_proj(x).reshape(tokens, self.n_kv_heads, 1, self.head_dim)
        rope: Any = self.rope
        queries = rope(queries, offset=cache.offset)
        cache.update_and_fetch(rope(keys, offset=cache.offset), values)
        out = cache.attend(queries, scale=self.scale, mask=mask, soft_cap=self.attn_logit_softcapping or None)
        output = self.o_proj(out.reshape(tokens, 1, -1))
        return output


class Model(gear.Model):
    """mlx-lm's Gear with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for index, layer in enumerate(self.layers):
            if layer.is_attention_layer:
                layer.self_attn = Attention(args, index)
