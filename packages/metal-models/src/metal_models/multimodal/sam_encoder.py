"""SAM's image encoder, as mlx-vlm has it, at sizes other than the one it was trained for."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from metal_models.multimodal.resized_grid import antialiased, linear, shares


def any_size(encoder: Any) -> None:
    """Let an encoder of mlx-vlm's resize what stands for places as PyTorch does; mlx-vlm does it otherwise."""
    encoder.__class__ = _encoder(type(encoder))
    for block in encoder.blocks:
        block.attn.__class__ = _Attention


def _encoder(cls: Any) -> Any:
    def call(self: Any, images: mx.array) -> mx.array:
        x: mx.array = self.patch_embed(images)
        x = x + antialiased(self.pos_embed, x.shape[1], x.shape[2]).astype(x.dtype)
        for part in (*self.blocks, *self.neck, self.net_2, self.net_3):
            x = part(x)
        return x

    return type(cls.__name__, (cls,), {"__call__": call})


class _Attention(nn.Module):
    """Attention of all cells of a grid, weighted by how many rows and columns they are apart."""

    def __call__(self, x: Float[mx.array, "grids rows columns width"]) -> Float[mx.array, "grids rows columns width"]:
        count, rows, columns, width = x.shape
        qkv = self.qkv(x).reshape(count, rows * columns, 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
        queries, keys, values = qkv[0], qkv[1], qkv[2]
        cells = queries.reshape(count, self.num_heads, rows, columns, -1)
        down = mx.einsum("ghrcd,rkd->ghrck", cells, _by_distance(self.rel_pos_h, rows))
        across = mx.einsum("ghrcd,ckd->ghrck", cells, _by_distance(self.rel_pos_w, columns))
        apart = (down[..., None] + across[..., None, :]).reshape(*queries.shape[:3], rows * columns)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=apart)
        seen: mx.array = self.proj(out.transpose(0, 2, 1, 3).reshape(count, rows, columns, width))
        return seen


def _by_distance(table: Float[mx.array, "distances width"], size: int) -> Float[mx.array, "size size width"]:
    """Return the entry of a table for each pair of ``size`` lines; the table is of another size, perhaps."""
    if table.shape[0] != 2 * size - 1:
        resized = mx.array(shares(table.shape[0], 2 * size - 1, linear)) @ table.astype(mx.float32)
        table = resized.astype(table.dtype)
    lines = mx.arange(size)
    return table[lines[:, None] - lines[None] + size - 1]
