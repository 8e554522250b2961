"""DeepSeek-V3.2: latent attention to the keys that an indexer picks."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v32
from mlx_lm.models.deepseek_v32 import ModelArgs

from metal_kernels import RaggedBatch
from metal_models.adapters import sparse_rows
from metal_models.cache_view import CacheView
from metal_models.layer import ViewList

__all__ = ["Attention", "Model", "ModelArgs"]


class Indexer(deepseek_v32.Indexer):
    """The indexer over paged index keys."""

    def pick(self, x: mx.array, queries: mx.array, cache: CacheView) -> mx.array | None:
        """Cache the index keys of rows ``x`` ``[tokens, 1, hidden]`` and return the positions to attend to.

        Args:
            x: Normed hidden rows.
            queries: Compressed queries of the same rows.
            cache: The view of the index keys.

        Returns:
            int32 ``[tokens, index_topk]``, -1 for none; None where every context is short enough to see whole.
        """
        tokens = x.shape[0]
        rope: Any = self.rope
        keys = rope(self.k_norm(self.wk(x))[:, None], offset=cache.offset)
        cache.update_and_fetch(keys, mx.zeros((tokens, 1, 1, 0), keys.dtype))
        if cache.max_context <= self.index_topk:
            return None
        rotated = rope(self.wq_b(queries).reshape(tokens, self.n_heads, 1, self.head_dim), offset=cache.offset)
        rows: mx.array = rotated.squeeze(2).swapaxes(0, 1)
        weights: mx.array = self.weights_proj(x).squeeze(1).T * (self.n_heads**-0.5 * self.softmax_scale)

        def score(part: slice, index_keys: mx.array) -> mx.array:
            scores = mx.maximum(rows[:, part] @ index_keys.astype(rows.dtype).T, 0)
            weighted: mx.array = (scores * weights[:, part, None]).sum(axis=0)
            return weighted

        def use(pages: mx.array, batch: RaggedBatch) -> mx.array:
            return sparse_rows.pick(pages, batch, self.index_topk, score, self.n_heads)

        like = mx.zeros((tokens, self.index_topk), mx.int32)
        picked: mx.array = cache.read(use, like)
        return picked


class Attention(deepseek_v32.DeepseekV32Attention):
    """DeepSeek-V3.2's attention over paged latents and index keys."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.indexer = Indexer(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]``."""
        output: mx.array
        if not isinstance(cache, ViewList):
            output = super().__call__(x, mask, cache)
            return output
        latents, index = cache[0], cache[1]
        tokens = x.shape[0]
        compressed = self.q_a_layernorm(self.q_a_proj(x))
        queries = self.q_b_proj(compressed).reshape(tokens, self.num_heads, 1, self.q_head_dim)
        query, query_rope = mx.split(queries, [self.qk_nope_head_dim], axis=-1)
        latent, key_rope = mx.split(self.kv_a_proj_with_mqa(x), [self.kv_lora_rank], axis=-1)
        rope: Any = self.rope
        query_rope = rope(query_rope, latents.offset)
        _, rope_keys = latents.update_and_fetch(
            self.kv_a_layernorm(latent)[:, None], rope(key_rope[:, None], latents.offset)
        )
        picked = self.indexer.pick(x, compressed, index)
        absorbed = self.embed_q(query)
        if picked is None:
            scores = (query_rope * self.scale) @ rope_keys.swapaxes(-1, -2)
            weighted = latents.attend_latent(absorbed, scores, scale=self.scale)
        else:
            joined = mx.concatenate([absorbed, query_rope], axis=-1).squeeze(2)
            weighted = latents.read(
                lambda pages, batch: self._attend_picked(joined, picked, pages, batch), absorbed.squeeze(2)
            )[:, :, None]
        output = self.o_proj(self.unembed_out(weighted).reshape(tokens, 1, -1))
        return output

    def _attend_picked(self, queries: mx.array, picked: mx.array, pages: mx.array, batch: RaggedBatch) -> mx.array:
        """Attend every row to the latents at its picked positions; each row is a batch entry of its own."""
        outputs = []
        for rows in sparse_rows.pieces(len(queries), picked.shape[1] * pages.shape[-1]):
            keys = pages[sparse_rows.slots(batch, rows, picked[rows], pages.shape[1])]
            keys = keys[:, None].astype(queries.dtype)
            out = mx.fast.scaled_dot_product_attention(
                queries[rows, None],
                keys,
                keys[..., : self.kv_lora_rank],
                scale=self.scale,
                mask=(picked[rows] >= 0)[:, None, None],
            )
            outputs.append(out[:, 0])
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


class Model(deepseek_v32.Model):
    """mlx-lm's DeepSeek-V3.2 with the attention above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            layer.self_attn = Attention(args)
