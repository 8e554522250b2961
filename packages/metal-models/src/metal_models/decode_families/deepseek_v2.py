"""DeepSeek-V2: latent attention with one projection from latents to keys and values, and a router without biases."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear

from metal_models.decode_families.deepseek_v3 import latent_program, layer_possible
from metal_models.decode_program import DecodeProgram
from metal_models.head_linear import HeadLinear
from metal_models.rotation import Rotation


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    if not all(map(joined_heads_possible, backbone.layers)):
        return None
    first = backbone.layers[0].self_attn
    rotation = Rotation(first.rope, first.qk_rope_head_dim, True)  # all layers' are made from the same config
    heads = [separate_heads(layer.self_attn) for layer in backbone.layers]
    return latent_program(backbone, [rotation] * len(heads), heads)


def joined_heads_possible(layer: Any) -> bool:
    """Whether the linear layers of a layer are as usual, the one of all heads' keys and values too."""
    heads = layer.self_attn.kv_b_proj
    known = type(heads) is nn.Linear or (type(heads) is nn.QuantizedLinear and heads.mode == "affine")
    return known and layer_possible(layer)


def separate_heads(attention: Any, factor: float = 1.0) -> tuple[HeadLinear, HeadLinear]:
    """Return what makes queries that meet latents, and ``factor`` times the values of weighted latents.

    Keys' and values' parts of ``kv_b_proj`` are copied for each head, numbers where they are codes.
    """
    layer = attention.kv_b_proj
    weight = layer.weight
    if isinstance(layer, nn.QuantizedLinear):
        weight = mx.dequantize(weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits)
    by_head = weight.reshape(attention.num_heads, -1, attention.kv_lora_rank)
    keys, values = mx.split(by_head, [attention.qk_nope_head_dim], axis=1)
    return _stacked(keys.swapaxes(1, 2)), _stacked(values if factor == 1.0 else values * factor)


def _stacked(weight: mx.array) -> HeadLinear:
    heads, outputs, inputs = weight.shape
    module = MultiLinear(inputs, outputs, heads)
    module.weight = mx.contiguous(weight)
    mx.eval(module.weight)
    return HeadLinear(module)
