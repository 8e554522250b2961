"""Lay weights out so that MLX's CPU backend multiplies by them fast."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


def expanded_nbytes(model: nn.Module) -> int:
    """Return the bytes of the model's linear and embedding weights once held in float32."""
    return sum(_shape(module)[0] * _shape(module)[1] * 4 for module in _weights(model).values())


def lay_out_for_cpu(model: nn.Module) -> int:
    """Hold every linear and embedding weight in float32, stored column by column; returns how many.

    MLX's CPU quantized matmul is a scalar loop, and its one-row float matmul is three times faster when the
    operand ``weight.T`` is row-contiguous, so the weight becomes a transposed view of such an array. Shapes, names
    and results stay; only float32 models gain, so others are left alone. Replaces modules of ``model`` in place.
    """
    replaced = 0
    for path, module in _weights(model).items():
        bias = module.get("bias")
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weight = mx.dequantize(
                module["weight"],
                module["scales"],
                module.get("biases"),
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
            )
        else:
            weight = module["weight"]
        plain = (
            nn.Embedding(1, 1) if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) else nn.Linear(1, 1, False)
        )
        by_column = mx.contiguous(weight.astype(mx.float32).T)
        mx.eval(by_column)
        plain.weight = by_column.T
        if bias is not None:
            plain.bias = bias.astype(mx.float32)
        model.update_modules(tree_unflatten([(path, plain)]))
        replaced += 1
    return replaced


def _weights(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    return {path: module for path, module in model.named_modules() if type(module) in kinds}


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module["weight"].shape
    bits = getattr(module, "bits", None)
    return rows, columns * 32 // bits if bits else columns
