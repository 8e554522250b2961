"""PLaMo: heads of keys are shared by turns, not by groups."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import plamo
from mlx_lm.models.plamo import ModelArgs

from metal_models.cache_view import CacheView

__all__ = ["Model", "ModelArgs"]


class Attention(plamo.Attention):
    """PLaMo's attention, with queries put beside the ones that share their key head instead of repeating keys."""

    def __call__(self, hidden_states: mx.array, attention_mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]``."""
        output: mx.array
        if not isinstance(cache, CacheView):
            output = super().__call__(hidden_states, attention_mask, cache)
            return output
        tokens = hidden_states.shape[0]
        queries = self.q_proj(hidden_states).reshape(tokens, self.q_num_heads, 1, self.qk_dim)
        keys = self.k_proj(hidden_states).reshape(tokens, self.k_num_heads, 1, self.qk_dim)
        values = self.v_proj(hidden_states).reshape(tokens, self.v_num_heads, 1, self.v_dim)
        rope: Any = self.rotary_emb
        queries = rope(queries, offset=cache.offset)
        cache.update_and_fetch(rope(keys, offset=cache.offset), values)
        # Query head h uses key head h % key heads; attention wants those of a key head side by side.
        by_turns = queries.reshape(tokens, -1, self.k_num_heads, self.qk_dim)
        by_groups = by_turns.swapaxes(1, 2).reshape(queries.shape)
        out = cache.attend(by_groups, scale=self.scale, mask=attention_mask)
        out = out.reshape(tokens, self.k_num_heads, -1, self.v_dim).swapaxes(1, 2)
        output = self.o_proj(out.reshape(tokens, 1, -1))
        return output


class Model(plamo.Model):
    """mlx-lm's PLaMo with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.self_attn = Attention(args)
