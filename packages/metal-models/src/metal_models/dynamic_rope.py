"""Rotary embeddings whose base grows with the context, for rows that each have a position of their own."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import rope_utils

_DynamicRoPE: Any = rope_utils.DynamicNTKScalingRoPE


class DynamicNTKScalingRoPE(_DynamicRoPE):  # type: ignore[misc]
    """mlx-lm's dynamic NTK scaling, which also takes a vector of positions.

    A base that depends on the longest context of a call would make a cached key depend on how its prompt was cut, so
    with a vector each row is turned as if it were the last one. That is what mlx-lm does for generated tokens, and for
    all tokens within ``max_position_embeddings``.
    """

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Turn heads ``[batch, heads, length, head_size]``; ``offset`` is the first position, of each or of all."""
        if not isinstance(offset, mx.array) or offset.ndim == 0:
            turned: mx.array = super().__call__(x, offset)
            return turned
        positions = (offset[:, None] + mx.arange(x.shape[2])).astype(mx.float32)
        stretch = mx.maximum(positions + 1, self.max_position_embeddings) / self.max_position_embeddings
        bases = self.base * (self.factor * stretch - (self.factor - 1)) ** (self.dims / (self.dims - 2))
        exponents = -mx.arange(0, self.dims, 2, dtype=mx.float32) / self.dims
        angles = (positions[..., None] * bases[..., None] ** exponents)[:, None]
        return self._turn(x, mx.cos(angles), mx.sin(angles))

    def _turn(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Turn the first ``dims`` elements of each head by angles ``[batch, 1, length, dims / 2]``."""
        heads = x[..., : self.dims].astype(mx.float32)
        pairs = heads.reshape(*x.shape[:3], *((-1, 2) if self.traditional else (2, -1)))
        axis = -1 if self.traditional else -2
        first, second = (half.squeeze(axis) for half in mx.split(pairs, 2, axis=axis))
        turned = mx.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
        turned = turned.reshape(heads.shape).astype(x.dtype)
        return turned if self.dims == x.shape[-1] else mx.concatenate([turned, x[..., self.dims :]], axis=-1)
