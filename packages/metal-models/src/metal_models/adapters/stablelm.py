"""StableLM: the shared attention function gets float32 copies of the keys."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import stablelm
from mlx_lm.models.stablelm import ModelArgs

from metal_models.cache_view import CacheView

__all__ = ["Model", "ModelArgs"]


class Attention(stablelm.Attention):
    """StableLM's attention without the copies: the paged kernels accumulate in float32 by themselves."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]``."""
        output: mx.array
        if not isinstance(cache, CacheView):
            mlx_lm_attention: Any = super().__call__
            output = mlx_lm_attention(x, mask, cache)
            return output
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        queries, keys = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads)
        if self.qk_layernorm:
            queries, keys = self.q_layernorm(queries), self.k_layernorm(keys)
        rope: Any = self.rope
        queries = rope(queries.transpose(0, 2, 1, 3), offset=cache.offset)
        keys = rope(keys.transpose(0, 2, 1, 3), offset=cache.offset)
        cache.update_and_fetch(keys, self.v_proj(x).reshape(heads).transpose(0, 2, 1, 3))
        out = cache.attend(queries, scale=self.head_dim**-0.5, mask=mask)
        output = self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        return output


class Model(stablelm.Model):
    """mlx-lm's StableLM with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.self_attn = Attention(args)
