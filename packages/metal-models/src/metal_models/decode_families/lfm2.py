"""LFM2: gated short convolutions with some layers of attention, dense or with experts."""

from typing import Any

from metal_models.attention_mixer import AttentionMixer
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.feed_forward import GatedFeedForward, ModuleFeedForward
from metal_models.joined_linear import JoinedLinear
from metal_models.recurrent_mixer import ShortConvMixer
from metal_models.rotation import Rotation, rotations_of
from metal_models.token_mixer import TokenMixer

# Names of the projections of a dense feed-forward part: gate, up, down.
_DENSE = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    rotations = rotations_of([layer.self_attn for layer in backbone.layers if layer.is_attention_layer])
    if rotations is None or not all(map(_possible, backbone.layers)):
        return None
    layers = []
    for layer in backbone.layers:
        mixer: TokenMixer
        if layer.is_attention_layer:
            mixer = _attention(layer.self_attn, rotations[id(layer.self_attn)])
        else:
            module = layer.conv
            mixer = ShortConvMixer(JoinedLinear([module.in_proj]), module.conv, JoinedLinear([module.out_proj]))
        dense = _dense(layer.feed_forward)
        feed_forward = GatedFeedForward(*dense) if dense else ModuleFeedForward(layer.feed_forward)
        layers.append(DecodeLayer(mixer, layer.operator_norm, feed_forward, layer.ffn_norm))
    return DecodeProgram(backbone.embed_tokens, layers, backbone.embedding_norm)


def _dense(module: Any) -> list[Any]:
    """Return gate, up and down; nothing for experts."""
    names = next((names for names in _DENSE if all(hasattr(module, name) for name in names)), ())
    return [getattr(module, name) for name in names]


def _possible(layer: Any) -> bool:
    dense = _dense(layer.feed_forward)
    if dense and not GatedFeedForward.possible(*dense):
        return False
    if not layer.is_attention_layer:
        return JoinedLinear.joinable([layer.conv.in_proj]) and JoinedLinear.joinable([layer.conv.out_proj])
    return AttentionMixer.possible(layer.self_attn, layer.self_attn.out_proj)


def _attention(module: Any, rotation: Rotation) -> AttentionMixer:
    return AttentionMixer(
        rotation=rotation,
        scale=module.scale,
        q_heads=module.n_heads,
        qkv=JoinedLinear([module.q_proj, module.k_proj, module.v_proj]),
        output=JoinedLinear([module.out_proj]),
        norms=(module.q_layernorm, module.k_layernorm),
    )
