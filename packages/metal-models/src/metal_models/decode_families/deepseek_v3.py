"""DeepSeek-V3 and those built like it: latent attention, dense or with experts."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from metal_kernels import choose_experts
from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.expert_feed_forward import ExpertFeedForward
from metal_models.feed_forward import FeedForward, GatedFeedForward, ModuleFeedForward, feed_forward_possible
from metal_models.head_linear import HeadLinear
from metal_models.joined_linear import JoinedLinear
from metal_models.latent_mixer import LatentMixer
from metal_models.normed_rows import NormedRows
from metal_models.rotation import Rotation, find_rotations


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    rotations = find_rotations([layer.self_attn.rope for layer in backbone.layers])
    if rotations is None or not all(map(_possible, backbone.layers)):
        return None
    heads = [
        (HeadLinear(layer.self_attn.embed_q), HeadLinear(layer.self_attn.unembed_out)) for layer in backbone.layers
    ]
    return latent_program(backbone, rotations, heads)


def latent_program(
    backbone: Any, rotations: Sequence[Rotation], heads: Sequence[tuple[HeadLinear, HeadLinear]]
) -> DecodeProgram:
    """Return the program of a backbone with latent attention.

    Args:
        backbone: Its modules have DeepSeek-V3's names; :func:`layer_possible` holds for its layers.
        rotations: Of each layer.
        heads: For each layer, what makes queries that meet latents, and values of weighted latents.
    """
    layers = []
    for layer, rotation, (absorb, expand) in zip(backbone.layers, rotations, heads, strict=True):
        mixer = latent_mixer(layer.self_attn, rotation, absorb, expand, layer.self_attn.scale)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        layers.append(DecodeLayer(mixer, norms[0], _feed_forward(layer.mlp), norms[1]))
    return DecodeProgram(backbone.embed_tokens, layers, backbone.norm)


def latent_mixer(
    attention: Any, rotation: Rotation, absorb: HeadLinear, expand: HeadLinear, scale: float
) -> LatentMixer:
    """Return the mixer of an attention module whose parts have DeepSeek-V3's names.

    Args:
        attention: The module.
        rotation: Of rotary parts.
        absorb: Makes queries that meet latents.
        expand: Makes values of weighted latents.
        scale: Factor of the scores.
    """
    return LatentMixer(
        rotation=rotation,
        scale=scale,
        q_heads=attention.num_heads,
        project=_projections(attention),
        latent_norm=attention.kv_a_layernorm,
        absorb=absorb,
        expand=expand,
        output=JoinedLinear([attention.o_proj]),
    )


def layer_possible(layer: Any) -> bool:
    """Whether the linear layers around attention, and those of a dense feed-forward part, are as usual."""
    attention = layer.self_attn
    if not feed_forward_possible(layer.mlp):
        return False
    names = ["q_proj"] if attention.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    return all(JoinedLinear.joinable([getattr(attention, name)]) for name in (*names, "kv_a_proj_with_mqa", "o_proj"))


def _possible(layer: Any) -> bool:
    heads = (layer.self_attn.embed_q, layer.self_attn.unembed_out)
    return layer_possible(layer) and all(map(HeadLinear.possible, heads))


def _feed_forward(module: Any) -> FeedForward:
    if hasattr(module, "gate_proj"):
        return GatedFeedForward(module.gate_proj, module.up_proj, module.down_proj)
    shared = getattr(module, "shared_experts", None)
    if not ExpertFeedForward.possible(module) or not feed_forward_possible(shared):
        return ModuleFeedForward(module)

    chosen = module.gate.top_k
    if shared is None:
        return ExpertFeedForward(module, _router(module.gate), chosen, None)
    dense = GatedFeedForward(shared.gate_proj, shared.up_proj, shared.down_proj)
    return ExpertFeedForward(module, _router(module.gate), chosen, dense.added)


def _router(gate: Any) -> Callable[[NormedRows], tuple[mx.array, mx.array]]:
    """Return what chooses experts as mlx-lm's ``MoEGate`` does, DeepSeek-V3's with a bias or DeepSeek-V2's without."""
    logits, bias = JoinedLinear([gate]), getattr(gate, "e_score_correction_bias", None)
    normalised = bias is not None and gate.norm_topk_prob and gate.top_k > 1
    grouped = bias is not None or gate.topk_method == "group_limited_greedy"
    groups, kept = (gate.n_group, gate.topk_group) if grouped else (1, 1)
    if bias is not None:
        bias = bias.astype(mx.float32)
        mx.eval(bias)

    def choose(rows: NormedRows) -> tuple[mx.array, mx.array]:
        return choose_experts(
            rows.through(logits),
            gate.top_k,
            normalised=normalised,
            sigmoid_bias=bias,
            groups=groups,
            kept_groups=kept,
            scale=gate.routed_scaling_factor,
        )

    return choose


def _projections(attention: Any) -> Callable[[NormedRows], tuple[mx.array, mx.array]]:
    """Return what makes queries, by way of a narrower row or not, and latents."""
    latent = attention.kv_a_proj_with_mqa
    if attention.q_lora_rank is None:
        query, latents = JoinedLinear([attention.q_proj]), JoinedLinear([latent])
        return lambda rows: (rows.through(query), rows.through(latents))
    norm, up, rank = attention.q_a_layernorm, JoinedLinear([attention.q_b_proj]), attention.q_lora_rank
    if not JoinedLinear.joinable([attention.q_a_proj, latent]):
        down, latents = JoinedLinear([attention.q_a_proj]), JoinedLinear([latent])
        return lambda rows: (NormedRows(rows.through(down), norm).through(up), rows.through(latents))
    both = JoinedLinear([attention.q_a_proj, latent])

    def project(rows: NormedRows) -> tuple[mx.array, mx.array]:
        joined = rows.through(both)
        # The kernel reads the first elements of wider rows.
        narrow = joined if up.fuses(joined.dtype, joined.shape[0], normed=True) else joined[:, :rank]
        return NormedRows(narrow, norm).through(up), joined[:, rank:]

    return project
