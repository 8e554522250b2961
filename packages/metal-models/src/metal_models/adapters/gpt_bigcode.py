"""GPT BigCode: learned positions are looked up for every row."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import gpt_bigcode
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.gpt_bigcode import ModelArgs

from metal_models.cache_view import CacheView

__all__ = ["Model", "ModelArgs"]


class GPTBigCodeModel(gpt_bigcode.GPTBigCodeModel):
    """GPT BigCode's layers, without one Python offset for all rows."""

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Return the hidden rows ``[tokens, 1, hidden]`` of ids ``[tokens, 1]``."""
        if cache is None or not isinstance(cache[0], CacheView):
            hidden: mx.array = super().__call__(inputs, cache)
            return hidden
        hidden = self.wte(inputs) + self.wpe(cache[0].offset[:, None])
        mask = create_attention_mask(hidden, cache[0])
        for layer, layer_cache in zip(self.h, cache, strict=True):
            hidden = layer(hidden, mask, cache=layer_cache)
        normed: mx.array = self.ln_f(hidden)
        return normed


class Model(gpt_bigcode.Model):
    """mlx-lm's GPT BigCode with the layers above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.transformer = GPTBigCodeModel(args)
