"""DeepSeek-V3 and those built like it: latent attention, dense or with experts."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from metal_models.decode_program import Rotation, find_rotations
from metal_models.expert_feed_forward import ExpertFeedForward
from metal_models.feed_forward import FeedForward, GatedFeedForward, ModuleFeedForward, feed_forward_possible
from metal_models.joined_linear import JoinedLinear
from metal_models.latent_mixer import LatentMixer
from metal_models.mixed_program import MixedLayer, MixedProgram
from metal_models.normed_rows import NormedRows


def program(backbone: Any) -> MixedProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    rotations = find_rotations([layer.self_attn.rope for layer in backbone.layers])
    if rotations is None or not all(map(_possible, backbone.layers)):
        return None
    layers = []
    for layer, rotation in zip(backbone.layers, rotations, strict=True):
        mixer, norms = _latent(layer.self_attn, rotation), (layer.input_layernorm, layer.post_attention_layernorm)
        layers.append(MixedLayer(mixer, norms[0], _feed_forward(layer.mlp), norms[1]))
    return MixedProgram(backbone.embed_tokens, layers, backbone.norm)


def _possible(layer: Any) -> bool:
    attention = layer.self_attn
    if not feed_forward_possible(layer.mlp):
        return False
    names = ["q_proj"] if attention.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    return all(JoinedLinear.joinable([getattr(attention, name)]) for name in (*names, "kv_a_proj_with_mqa", "o_proj"))


def _feed_forward(module: Any) -> FeedForward:
    if hasattr(module, "gate_proj"):
        return GatedFeedForward(module.gate_proj, module.up_proj, module.down_proj)
    shared = getattr(module, "shared_experts", None)
    if not ExpertFeedForward.possible(module) or not feed_forward_possible(shared):
        return ModuleFeedForward(module)

    def choose(rows: mx.array) -> tuple[mx.array, mx.array]:
        experts, scores = module.gate(rows)
        return experts.astype(mx.int32), scores

    if shared is None:
        return ExpertFeedForward(module, choose, None)
    dense = GatedFeedForward(shared.gate_proj, shared.up_proj, shared.down_proj)
    return ExpertFeedForward(module, choose, lambda rows: dense.output(dense(rows)))


class _LowRankQuery:
    """Queries by way of a narrower row."""

    def __init__(self, attention: Any) -> None:
        self._down, self._up = JoinedLinear([attention.q_a_proj]), JoinedLinear([attention.q_b_proj])
        self._norm = attention.q_a_layernorm

    def __call__(self, rows: NormedRows) -> mx.array:
        return NormedRows(rows.through(self._down), self._norm).through(self._up)


def _latent(attention: Any, rotation: Rotation) -> LatentMixer:
    query: Callable[[NormedRows], mx.array]
    if attention.q_lora_rank is not None:
        query = _LowRankQuery(attention)
    else:
        projection = JoinedLinear([attention.q_proj])

        def query(rows: NormedRows) -> mx.array:
            return rows.through(projection)

    return LatentMixer(
        rotation=rotation,
        scale=attention.scale,
        q_heads=attention.num_heads,
        query=query,
        latent=JoinedLinear([attention.kv_a_proj_with_mqa]),
        latent_norm=attention.kv_a_layernorm,
        absorb=attention.embed_q,
        expand=attention.unembed_out,
        output=JoinedLinear([attention.o_proj]),
    )
