"""Granite 4: Mamba 2 with some layers of attention, dense or with experts; what a layer adds is scaled."""

from typing import Any

import mlx.core as mx

from metal_models.attention_mixer import AttentionMixer
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.feed_forward import (
    FeedForward,
    GatedFeedForward,
    ModuleFeedForward,
    ScaledFeedForward,
    feed_forward_possible,
)
from metal_models.joined_linear import JoinedLinear
from metal_models.mamba2_mixer import Mamba2Mixer
from metal_models.rotation import Rotation, rotations_of, unrotated
from metal_models.token_mixer import TokenMixer


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    attention = [layer.self_attn for layer in backbone.layers if layer.layer_type == "attention"]
    rotations = rotations_of([module for module in attention if module.rope is not None])
    if rotations is None or not all(map(_possible, backbone.layers)):
        return None
    layers = []
    for layer in backbone.layers:
        factor = layer.residual_multiplier
        mixer: TokenMixer
        if layer.layer_type == "attention":
            module = layer.self_attn
            mixer = _attention(module, rotations.get(id(module)) or unrotated(module.head_dim), factor)
        else:
            mixer = _mamba(layer.mamba, factor)
        feed_forward = ScaledFeedForward(_feed_forward(layer), factor)
        layers.append(DecodeLayer(mixer, layer.input_layernorm, feed_forward, layer.post_attention_layernorm))
    return DecodeProgram(lambda ids: backbone.embed_tokens(ids) * backbone.embedding_multiplier, layers, backbone.norm)


def _possible(layer: Any) -> bool:
    """Whether linear layers are of a known kind, and those that take scaled rows have no bias."""
    if not layer.use_moe and not feed_forward_possible(layer.mlp):
        return False
    if layer.layer_type == "attention":
        module = layer.self_attn
        last, known = module.o_proj, JoinedLinear.joinable([module.q_proj, module.k_proj, module.v_proj])
    else:
        last, known = layer.mamba.out_proj, Mamba2Mixer.possible(layer.mamba)
    ends = [last] if layer.use_moe else [last, layer.mlp.down_proj]
    return known and JoinedLinear.joinable([last]) and not any("bias" in end for end in ends)


def _feed_forward(layer: Any) -> FeedForward:
    if not layer.use_moe:
        return GatedFeedForward(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    return ModuleFeedForward(lambda rows: layer.block_sparse_moe(rows) + layer.shared_mlp(rows))


def _attention(module: Any, rotation: Rotation, factor: float) -> AttentionMixer:
    return AttentionMixer(
        rotation=rotation,
        scale=module.scale,
        q_heads=module.n_heads,
        qkv=JoinedLinear([module.q_proj, module.k_proj, module.v_proj]),
        output=JoinedLinear([module.o_proj]),
        norms=None,
        factor=factor,
    )


def _mamba(module: Any, factor: float) -> Mamba2Mixer:
    weight, eps = module.norm.weight * factor, module.norm.eps
    mx.eval(weight)
    return Mamba2Mixer.of(module, lambda values: mx.fast.rms_norm(values, weight, eps))
