"""Falcon-H1: Mamba 2 and attention side by side in every layer."""

from typing import Any

import mlx.core as mx

from metal_models.attention_mixer import AttentionMixer
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.feed_forward import GatedFeedForward, feed_forward_possible
from metal_models.joined_linear import JoinedLinear
from metal_models.mamba2_mixer import Mamba2Mixer
from metal_models.rotation import Rotation, rotations_of


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    rotations = rotations_of([layer.self_attn for layer in backbone.layers])
    if rotations is None or not all(map(_possible, backbone.layers)):
        return None
    layers = [
        DecodeLayer(
            _attention(layer.self_attn, rotations[id(layer.self_attn)]),
            layer.input_layernorm,
            GatedFeedForward(layer.feed_forward.gate_proj, layer.feed_forward.up_proj, layer.feed_forward.down_proj),
            layer.pre_ff_layernorm,
            beside=_mamba(layer.mamba),
        )
        for layer in backbone.layers
    ]
    return DecodeProgram(backbone.embed_tokens, layers, backbone.final_layernorm)


def _possible(layer: Any) -> bool:
    mamba, attention = layer.mamba, layer.self_attn
    if mamba.mamba_rms_norm and mamba.norm.norm_before_gate:
        return False
    linear = AttentionMixer.possible(attention, attention.o_proj)
    return linear and Mamba2Mixer.possible(mamba) and feed_forward_possible(layer.feed_forward)


def _attention(module: Any, rotation: Rotation) -> AttentionMixer:
    return AttentionMixer(
        rotation=rotation,
        scale=module.scale,
        q_heads=module.num_heads,
        qkv=JoinedLinear([module.q_proj, module.k_proj, module.v_proj]),
        output=JoinedLinear([module.o_proj]),
        norms=None,
    )


def _mamba(module: Any) -> Mamba2Mixer:
    if not module.mamba_rms_norm:
        return Mamba2Mixer.of(module, lambda values: values)
    weight, eps = module.norm.weight, module.norm.variance_epsilon
    return Mamba2Mixer.of(module, lambda values: mx.fast.rms_norm(values, weight, eps))
