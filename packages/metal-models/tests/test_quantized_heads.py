"""Quantised heads are replaced where a kernel serves them, and nowhere else."""

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import target
from metal_models.quantized_heads import speed_up_heads


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.QuantizedEmbedding(64, 128)
        self.lm_head = nn.QuantizedLinear(128, 64, bias=False)
        self.other = nn.QuantizedLinear(128, 64)


def test_heads_compute_as_before():
    model, rows = Model(), mx.random.normal((3, 1, 128))
    before = model.embed_tokens.as_linear(rows), model.lm_head(rows), model.embed_tokens(mx.array([1, 5]))
    other = model.other
    assert speed_up_heads(model) == (2 if target() == "cuda" else 0)
    after = model.embed_tokens.as_linear(rows), model.lm_head(rows), model.embed_tokens(mx.array([1, 5]))
    for one, two in zip(before, after, strict=True):
        assert mx.allclose(one, two, rtol=1e-2, atol=1e-2).item()
    assert model.other is other
