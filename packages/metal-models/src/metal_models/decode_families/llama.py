"""Llama and those built like it: attention over rotated heads, normed or not, and a dense part gated by a SiLU."""

from typing import Any

from metal_models.attention_mixer import AttentionMixer
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.feed_forward import GatedFeedForward, feed_forward_possible
from metal_models.joined_linear import JoinedLinear
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
            GatedFeedForward(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj),
            layer.post_attention_layernorm,
        )
        for layer in backbone.layers
    ]
    return DecodeProgram(backbone.embed_tokens, layers, backbone.norm)


def _possible(layer: Any) -> bool:
    linear = AttentionMixer.possible(layer.self_attn, layer.self_attn.o_proj)
    return linear and hasattr(layer.mlp, "gate_proj") and feed_forward_possible(layer.mlp)


def _attention(module: Any, rotation: Rotation) -> AttentionMixer:
    return AttentionMixer(
        rotation=rotation,
        scale=module.scale,
        q_heads=module.n_heads,
        qkv=JoinedLinear([module.q_proj, module.k_proj, module.v_proj]),
        output=JoinedLinear([module.o_proj]),
        norms=(module.q_norm, module.k_norm) if hasattr(module, "q_norm") else None,
    )
