"""Nemotron-H: blocks of Mamba 2, attention without rotation, or a feed-forward part, each with a norm of its own."""

from typing import Any

import mlx.core as mx

from metal_models.attention_mixer import AttentionMixer
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.feed_forward import ModuleFeedForward
from metal_models.joined_linear import JoinedLinear
from metal_models.mamba2_mixer import Mamba2Mixer
from metal_models.rotation import unrotated
from metal_models.token_mixer import TokenMixer

_MIXERS = _MAMBA, _ATTENTION = "M", "*"


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    if not all(_possible(block) for block in backbone.layers if block.block_type in _MIXERS):
        return None
    layers = [
        DecodeLayer(_mixer(block), block.norm)
        if block.block_type in _MIXERS
        else DecodeLayer(None, block.norm, ModuleFeedForward(block.mixer))
        for block in backbone.layers
    ]
    return DecodeProgram(backbone.embeddings, layers, backbone.norm_f)


def _possible(block: Any) -> bool:
    module = block.mixer
    if block.block_type == _MAMBA:
        return Mamba2Mixer.possible(module)
    return AttentionMixer.possible(module, module.o_proj)


def _mixer(block: Any) -> TokenMixer:
    module = block.mixer
    if block.block_type == _ATTENTION:
        return AttentionMixer(
            rotation=unrotated(module.head_dim),
            scale=module.scale,
            q_heads=module.num_heads,
            qkv=JoinedLinear([module.q_proj, module.k_proj, module.v_proj]),
            output=JoinedLinear([module.o_proj]),
            norms=None,
        )
    norm = module.norm

    def by_group(values: mx.array) -> mx.array:
        groups = values.reshape(values.shape[0], -1, norm.group_size)
        normed: mx.array = norm.weight * mx.fast.rms_norm(groups, None, norm.eps).reshape(values.shape)
        return normed

    return Mamba2Mixer.of(module, by_group)
