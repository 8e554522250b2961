"""Llama 4: chunked layers get their masks from positions, and layers without them scale queries by theirs."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import llama4
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.llama4 import ModelArgs

from metal_models.cache_view import CacheView

__all__ = ["Model", "ModelArgs"]


class Attention(llama4.Attention):
    """Llama 4's attention, with one temperature per row."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]``."""
        output: mx.array
        if not isinstance(cache, CacheView):
            output = super().__call__(x, mask, cache)
            return output
        tokens = x.shape[0]
        queries = self.q_proj(x).reshape(tokens, self.n_heads, 1, self.head_dim)
        keys = self.k_proj(x).reshape(tokens, self.n_kv_heads, 1, self.head_dim)
        values = self.v_proj(x).reshape(tokens, self.n_kv_heads, 1, self.head_dim)
        if self.use_rope:
            rope: Any = self.rope
            queries, keys = rope(queries, offset=cache.offset), rope(keys, offset=cache.offset)
        elif self.attn_temperature_tuning:
            steps = mx.floor((cache.offset + 1).astype(mx.float32) / self.floor_scale)
            scales = mx.log(steps + 1.0) * self.attn_scale + 1.0
            queries = (queries * scales[:, None, None, None]).astype(queries.dtype)
        if self.use_qk_norm:
            queries, keys = (mx.fast.rms_norm(rows, weight=None, eps=1e-6) for rows in (queries, keys))
        cache.update_and_fetch(keys, values)
        out = cache.attend(queries, scale=self.scale, mask=mask)
        output = self.o_proj(out.reshape(tokens, 1, -1))
        return output


class LlamaModel(llama4.LlamaModel):
    """Llama 4's layers, each with the mask of its own view."""

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Return the hidden rows ``[tokens, 1, hidden]`` of ids ``[tokens, 1]``."""
        if cache is None or not isinstance(cache[0], CacheView):
            hidden: mx.array = super().__call__(inputs, cache)
            return hidden
        hidden = self.embed_tokens(inputs)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, create_attention_mask(hidden, layer_cache), cache=layer_cache)
        normed: mx.array = self.norm(hidden)
        return normed


class Model(llama4.Model):
    """mlx-lm's Llama 4 with the layers above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        text: Any = args.text_config
        self.language_model.model = LlamaModel(text)
        for index, layer in enumerate(self.layers):
            layer.self_attn = Attention(text, index)
