"""BitNet: ternary weights, multiplied with plain MLX where mlx-lm's Metal kernel cannot run."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import bitlinear_layers, bitnet
from mlx_lm.models.bitnet import ModelArgs

from metal_kernels import target

__all__ = ["BitLinear", "Model", "ModelArgs"]


class BitLinear(bitlinear_layers.BitLinear):
    """A linear layer with weights -1, 0 and 1; a byte holds one of each quarter of the outputs."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``[..., out_features]`` of ``[..., in_features]``."""
        if target() == "metal":
            mlx_lm_kernel: Any = super().__call__
            output: mx.array = mlx_lm_kernel(x)
            return output
        quarters = (self.weight >> mx.array([0, 2, 4, 6], mx.uint8)[:, None, None]) & 3
        ternary = quarters.reshape(-1, self.in_features)[: self.out_features].astype(x.dtype) - 1
        scale = self.weight_scale.astype(x.dtype)
        output = x @ ternary.T
        output = output / scale if self.invert_weight_scales else output * scale
        return output if self.bias is None else output + self.bias


class Model(bitnet.Model):
    """mlx-lm's BitNet with the layers above; parameters have the same names."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        for layer in self.layers:
            _replace(layer.self_attn)
            _replace(layer.mlp)


def _replace(module: nn.Module) -> None:
    """Put our layers in place of mlx-lm's among the children of ``module``."""
    make: Any = BitLinear
    for name, child in module.children().items():
        if type(child) is bitlinear_layers.BitLinear:
            old: Any = child
            new = make(old.in_features, old.out_features, old.bias is not None, old.invert_weight_scales)
            setattr(module, name, new)
