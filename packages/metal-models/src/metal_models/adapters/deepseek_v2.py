"""DeepSeek-V2: latents are cached, not the keys and values expanded from them."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v2
from mlx_lm.models.deepseek_v2 import ModelArgs

from metal_models.adapters import expanded_latents
from metal_models.cache_view import CacheView

__all__ = ["Model", "ModelArgs"]


class Attention(deepseek_v2.DeepseekV2Attention):
    """DeepSeek-V2's attention over latents."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]``."""
        if isinstance(cache, CacheView):
            return expanded_latents.attend(self, x, cache, self.scale)
        output: mx.array = super().__call__(x, mask, cache)
        return output


class Model(deepseek_v2.Model):
    """mlx-lm's DeepSeek-V2 with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.self_attn = Attention(args)
