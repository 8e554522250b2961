"""MiniMax M3: some layers attend to the blocks of keys that an indexer picks."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import minimax_m3_vl
from mlx_lm.models.minimax_m3_vl import ModelArgs, TextArgs

from metal_kernels import RaggedBatch
from metal_models.adapters import sparse_rows
from metal_models.cache_view import CacheView
from metal_models.errors import MetalModelsError
from metal_models.layer import ViewList

__all__ = ["Model", "ModelArgs"]


class Attention(minimax_m3_vl.Attention):
    """MiniMax M3's attention over paged keys, values and index keys."""

    # Optional in the config, and given whenever a layer is sparse.
    index_n_heads: int
    index_head_dim: int
    index_block_size: int
    index_topk_blocks: int

    def __init__(self, args: TextArgs, layer_idx: int) -> None:
        super().__init__(args, layer_idx)
        heads = self.num_key_value_heads
        if self.is_sparse_attn and self.index_n_heads % heads and heads % self.index_n_heads:
            raise MetalModelsError(
                f"[load] expected a multiple or a divisor of {heads} index heads, got {self.index_n_heads}. "
                "Check the model's config.json."
            )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attend from rows ``[tokens, 1, hidden]``."""
        output: mx.array
        if not isinstance(cache, ViewList):
            output = super().__call__(x, mask, cache)
            return output
        view, tokens = cache[0], x.shape[0]
        queries = self.q_proj(x).reshape(tokens, self.num_attention_heads, 1, self.head_dim)
        keys = self.k_proj(x).reshape(tokens, self.num_key_value_heads, 1, self.head_dim)
        values = self.v_proj(x).reshape(tokens, self.num_key_value_heads, 1, self.head_dim)
        if self.use_qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        rope: Any = self.rope
        queries = rope(queries, offset=view.offset)
        view.update_and_fetch(rope(keys, offset=view.offset), values)
        picked = self._pick(x, cache[1]) if self.is_sparse_attn else None
        if picked is None:
            out = view.attend(queries, scale=self.scale, mask=mask)
        else:
            rows = queries.squeeze(2)
            out = view.read(lambda pages, batch: self._attend_picked(rows, picked, view.offset, pages, batch), rows)
        output = self.o_proj(out.reshape(tokens, 1, -1))
        return output

    def _pick(self, x: mx.array, cache: CacheView) -> mx.array | None:
        """Cache index keys; return the blocks that each row attends to, int32 ``[tokens, index_heads, blocks]``.

        Blocks here are the indexer's. -1 stands for none; None means that every context is short enough to see whole.
        """
        tokens, heads, topk = x.shape[0], self.index_n_heads, self.index_topk_blocks
        rope: Any = self.index_rope
        keys = self.index_k_norm(self.index_k_proj(x).reshape(tokens, 1, 1, self.index_head_dim))
        cache.update_and_fetch(rope(keys, offset=cache.offset), mx.zeros((tokens, 1, 1, 0), keys.dtype))
        if cache.max_context <= topk * self.index_block_size:
            return None
        queries = self.index_q_norm(self.index_q_proj(x).reshape(tokens, heads, 1, self.index_head_dim))
        rows = rope(queries, offset=cache.offset).squeeze(2).swapaxes(0, 1).astype(mx.float32)

        def use(pages: mx.array, batch: RaggedBatch) -> mx.array:
            pieces = sparse_rows.requests(pages, batch, heads)
            picked = [self._pick_blocks(rows[:, part], seen, positions) for part, seen, positions in pieces]
            return mx.concatenate(picked).astype(mx.int32)

        return cache.read(use, mx.zeros((tokens, heads, topk), mx.int32))

    def _pick_blocks(self, queries: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
        """Return the best blocks ``[rows, index_heads, blocks]`` of one request's ``keys`` ``[keys, size]``."""
        size, topk = self.index_block_size, self.index_topk_blocks
        blocks, own = -(-len(keys) // size), (positions // size)[:, None]
        if blocks <= topk:
            chosen = mx.broadcast_to(mx.arange(topk), (len(queries), len(positions), topk))
        else:
            scores = queries @ keys.astype(mx.float32).T
            scores = mx.where(mx.arange(len(keys)) <= positions[:, None], scores, -mx.inf)
            scores = mx.pad(scores, [(0, 0), (0, 0), (0, blocks * size - len(keys))], constant_values=-mx.inf)
            best = scores.reshape(*scores.shape[:2], blocks, size).max(axis=-1)
            ids = mx.arange(blocks)
            local = (ids <= own) & (ids > own - self.index_local_blocks)
            chosen = mx.argpartition(-mx.where(local, mx.inf, best), kth=topk - 1, axis=-1)[..., :topk]
            chosen = chosen.astype(mx.int32)
        return mx.where(chosen <= own, chosen, -1).swapaxes(0, 1)

    def _attend_picked(
        self, queries: mx.array, picked: mx.array, positions: mx.array, pages: mx.array, batch: RaggedBatch
    ) -> mx.array:
        """Attend every row to the keys of its picked blocks; each row is a batch entry of its own."""
        size, group = self.index_block_size, self.num_attention_heads // self.index_n_heads
        shared = max(1, self.num_key_value_heads // self.index_n_heads)
        width = picked.shape[-1] * size
        outputs = []
        for rows in sparse_rows.pieces(len(queries), width * shared * self.head_dim):
            heads = []
            for head in range(self.index_n_heads):
                seen = (picked[rows, head, :, None] * size + mx.arange(size)).reshape(-1, width)
                mask = (seen >= 0) & (seen <= positions[rows, None])
                blocks, offsets = sparse_rows.slots(batch, rows, mx.where(mask, seen, 0), pages.shape[2])
                kv_heads = head * self.num_key_value_heads // self.index_n_heads + mx.arange(shared)
                at = (blocks[..., None], offsets[..., None])
                keys, values = (pages[at[0], half, at[1], kv_heads].swapaxes(1, 2) for half in (0, 1))
                out = mx.fast.scaled_dot_product_attention(
                    queries[rows, head * group : (head + 1) * group].reshape(
                        -1, shared, group // shared, self.head_dim
                    ),
                    keys.astype(queries.dtype),
                    values.astype(queries.dtype),
                    scale=self.scale,
                    mask=mask[:, None, None],
                )
                heads.append(out.reshape(-1, group, self.head_dim))
            outputs.append(mx.concatenate(heads, axis=1))
        return mx.concatenate(outputs)


class Model(minimax_m3_vl.Model):
    """mlx-lm's MiniMax M3 with the attention above; parameters have the same names."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__(config)
        text: Any = config.text_config
        for index, layer in enumerate(self.layers):
            layer.self_attn = Attention(text, index)
