"""MiniCPM3: dense layers with latent attention; embeddings and what a layer adds are scaled."""

from typing import Any

from metal_models.decode_families.deepseek_v2 import joined_heads_possible, separate_heads
from metal_models.decode_families.deepseek_v3 import latent_mixer
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.feed_forward import GatedFeedForward, ScaledFeedForward
from metal_models.rotation import find_rotations


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    rotations = find_rotations([layer.self_attn.rope for layer in backbone.layers])
    if rotations is None or not all(map(_possible, backbone.layers)):
        return None
    layers = []
    for layer, rotation in zip(backbone.layers, rotations, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        factor = layer.scale_depth / layer.num_hidden_layers**0.5
        absorb, expand = separate_heads(attention, factor)
        mixer = latent_mixer(attention, rotation, absorb, expand, attention.softmax_scale)
        feed_forward = ScaledFeedForward(GatedFeedForward(mlp.gate_proj, mlp.up_proj, mlp.down_proj), factor)
        layers.append(DecodeLayer(mixer, layer.input_layernorm, feed_forward, layer.post_attention_layernorm))
    return DecodeProgram(lambda ids: backbone.embed_tokens(ids) * backbone.args.scale_emb, layers, backbone.norm)


def _possible(layer: Any) -> bool:
    ends = (layer.self_attn.o_proj, layer.mlp.down_proj)
    return joined_heads_possible(layer) and not any("bias" in end for end in ends)
