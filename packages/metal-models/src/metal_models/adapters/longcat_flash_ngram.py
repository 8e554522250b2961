"""LongCat Flash with n-gram embeddings: the tokens that they look back on are a state of fixed size."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import longcat_flash_ngram
from mlx_lm.models.longcat_flash_ngram import ModelArgs

__all__ = ["Model", "ModelArgs"]


class NgramEmbedding(longcat_flash_ngram.NgramEmbedding):
    """The embedding whose text is preceded by zeros, which is what its shifts fill up with."""

    def __call__(self, input_ids: mx.array, cache: Any = None) -> mx.array:
        """Embed ids ``[batch, length]``."""
        if cache is not None and cache[0] is None:
            cache[0] = mx.zeros((input_ids.shape[0], self.n - 1), mx.int64)
        rows: mx.array = super().__call__(input_ids, cache)
        return rows


class Model(longcat_flash_ngram.Model):
    """mlx-lm's model with the embedding above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.model.ngram_embeddings = NgramEmbedding(args)
