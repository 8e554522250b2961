"""PLaMo 2: its attention layers call MLX's attention themselves."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import plamo2
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.plamo2 import ModelArgs

__all__ = ["Model", "ModelArgs"]


class Attention(plamo2.Attention):
    """PLaMo 2's attention through mlx-lm's shared function."""

    def __call__(self, hidden_states: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from ``[batch, length, hidden]``."""
        batch, length, _ = hidden_states.shape
        bounds = [self.q_proj_dim, self.q_proj_dim + self.k_proj_dim]
        queries, keys, values = (
            part.reshape(batch, length, -1, self.qk_dim).transpose(0, 2, 1, 3)
            for part in mx.split(self.qkv_proj(hidden_states), bounds, axis=-1)
        )
        offset = 0 if cache is None else cache.offset
        queries = self.rope(mx.fast.rms_norm(queries, None, 1e-6) * self.q_weight[:, None], offset=offset)
        keys = self.rope(mx.fast.rms_norm(keys, None, 1e-6) * self.k_weight[:, None], offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        output: mx.array = self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        return output


class Model(plamo2.Model):
    """mlx-lm's PLaMo 2 with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.model.layers.layers:
            if not layer.is_mamba:
                layer.mixer = Attention(args)
