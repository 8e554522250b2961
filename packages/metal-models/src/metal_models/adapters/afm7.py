"""AFM 7: the last layers reuse the keys and values of the layer before them."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import afm7
from mlx_lm.models.afm7 import ModelArgs

from metal_models.cache_view import CacheView, PagedMask

__all__ = ["Model", "ModelArgs"]


class KVReuseAttention(afm7.KVReuseAttention):
    """AFM 7's reusing attention, with a row's own position instead of one taken from the number of keys."""

    def __call__(self, x: mx.array, keys: mx.array, values: mx.array, mask: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]`` to the keys that another layer's view returned."""
        output: mx.array
        if not isinstance(mask, PagedMask):
            output = super().__call__(x, keys, values, mask)
            return output
        view: CacheView = mask.step.owner(keys, None)
        tokens = x.shape[0]
        rope: Any = self.rope
        queries = rope(self.q_proj(x).reshape(tokens, self.n_heads, 1, self.head_dim), offset=view.offset)
        out = view.attend(self.q_norm(queries), scale=self.scale, mask=mask)
        output = self.out_proj(out.reshape(tokens, 1, -1))
        return output


class Model(afm7.Model):
    """mlx-lm's AFM 7 with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.model.kv_reuse_layers:
            layer.self_attn = KVReuseAttention(args)
