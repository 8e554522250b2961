"""Qwen3-Next and Qwen3.5: gated delta nets with some layers of gated attention, dense or with experts."""

from typing import Any

import mlx.core as mx

from metal_kernels import GatedDeltaRows, HeadPart, choose_experts
from metal_models.attention_mixer import AttentionMixer
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.expert_feed_forward import ExpertFeedForward
from metal_models.feed_forward import FeedForward, GatedFeedForward, ModuleFeedForward, feed_forward_possible
from metal_models.joined_linear import JoinedLinear
from metal_models.joined_rows import JoinedRows
from metal_models.normed_rows import NormedRows
from metal_models.recurrent_mixer import GatedDeltaMixer
from metal_models.rotation import Rotation, rotations_of
from metal_models.token_mixer import TokenMixer


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    rotations = rotations_of([layer.self_attn for layer in backbone.layers if not layer.is_linear])
    if rotations is None or not all(map(_possible, backbone.layers)):
        return None
    layers = []
    for layer in backbone.layers:
        mixer: TokenMixer
        if layer.is_linear:
            mixer = _delta_net(layer.linear_attn)
        else:
            mixer = _attention(layer.self_attn, rotations[id(layer.self_attn)])
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        layers.append(DecodeLayer(mixer, norms[0], _feed_forward(layer.mlp), norms[1]))
    return DecodeProgram(backbone.embed_tokens, layers, backbone.norm)


def _possible(layer: Any) -> bool:
    if not feed_forward_possible(layer.mlp):
        return False
    if layer.is_linear:
        net = layer.linear_attn
        return "bias" not in net.conv1d and JoinedRows.possible([*_projections(net), net.out_proj])
    return AttentionMixer.possible(layer.self_attn, layer.self_attn.o_proj)


def _feed_forward(module: Any) -> FeedForward:
    if hasattr(module, "gate_proj"):
        return GatedFeedForward(module.gate_proj, module.up_proj, module.down_proj)
    shared = module.shared_expert
    if not ExpertFeedForward.possible(module) or not feed_forward_possible(shared):
        return ModuleFeedForward(module)
    dense = GatedFeedForward(shared.gate_proj, shared.up_proj, shared.down_proj)

    def choose(rows: NormedRows) -> tuple[mx.array, mx.array]:
        return choose_experts(module.gate(rows.normed), module.top_k, normalised=module.norm_topk_prob)

    def gated(rows: NormedRows) -> mx.array:
        weight: mx.array = mx.sigmoid(module.shared_expert_gate(rows.normed))
        return weight * dense.added(rows)

    return ExpertFeedForward(module, choose, module.top_k, gated)


def _attention(module: Any, rotation: Rotation) -> AttentionMixer:
    return AttentionMixer(
        rotation=rotation,
        scale=module.scale,
        q_heads=module.num_attention_heads,
        qkv=JoinedLinear([module.q_proj, module.k_proj, module.v_proj]),
        output=JoinedLinear([module.o_proj]),
        norms=(module.q_norm, module.k_norm),
        gated=True,
    )


def _projections(net: Any) -> list[Any]:
    if hasattr(net, "in_proj_qkvz"):
        return [net.in_proj_qkvz, net.in_proj_ba]
    return [net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a]


def _delta_net(net: Any) -> GatedDeltaMixer:
    decay = -mx.exp(net.A_log.astype(mx.float32))
    gates = mx.concatenate([decay, net.dt_bias.astype(mx.float32)])
    gates = mx.pad(gates, (0, max(0, 8 - gates.size)))
    conv = mx.contiguous(net.conv1d.weight.squeeze(-1))
    mx.eval(gates, conv)
    return GatedDeltaMixer(
        layout=_layout(net),
        projections=JoinedRows(_projections(net)),
        conv=conv,
        gates=gates,
        norm=net.norm.weight,
        eps=net.norm.eps,
        output=JoinedLinear([net.out_proj]),
    )


def _layout(net: Any) -> GatedDeltaRows:
    """Say where the projections put what: head by head in Qwen3-Next, kind by kind in Qwen3.5."""
    keys, ratio = net.head_k_dim, net.num_v_heads // net.num_k_heads
    values = ratio * net.head_v_dim
    if hasattr(net, "in_proj_qkvz"):
        step, numbers = 2 * keys + 2 * values, 2 * (net.key_dim + net.value_dim)
        starts = (0, keys, 2 * keys, 2 * keys + values, numbers, numbers + ratio)
        steps = (step, step, step, step, 2 * ratio, 2 * ratio)
    else:
        gate = 2 * net.key_dim + net.value_dim
        beta = gate + net.value_dim
        starts = (0, net.key_dim, 2 * net.key_dim, gate, beta, beta + net.num_v_heads)
        steps = (keys, keys, values, values, ratio, ratio)
    parts = (HeadPart(start, step) for start, step in zip(starts, steps, strict=True))
    sizes = (net.num_k_heads, net.num_v_heads, net.head_k_dim, net.head_v_dim, net.conv_kernel_size)
    return GatedDeltaRows(*sizes, *parts)
