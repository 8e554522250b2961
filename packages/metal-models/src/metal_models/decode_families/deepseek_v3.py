"""DeepSeek-V3 and those built like it: latent attention, dense or with experts."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from metal_models.decode_program import Rotation, find_rotations
from metal_models.expert_feed_forward import ExpertFeedForward
from metal_models.joined_linear import JoinedLinear
from metal_models.latent_mixer import LatentMixer
from metal_models.mixed_program import GatedFeedForward, MixedLayer, MixedProgram, feed_forward_possible


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


def _feed_forward(module: Any) -> Callable[[mx.array], mx.array]:
    if hasattr(module, "gate_proj"):
        return GatedFeedForward(module.gate_proj, module.up_proj, module.down_proj)
    shared = getattr(module, "shared_experts", None)
    if not ExpertFeedForward.possible(module) or not feed_forward_possible(shared):
        plain: Callable[[mx.array], mx.array] = module
        return plain
    dense = GatedFeedForward(shared.gate_proj, shared.up_proj, shared.down_proj) if shared is not None else None

    def choose(rows: mx.array) -> tuple[mx.array, mx.array]:
        experts, scores = module.gate(rows)
        return experts.astype(mx.int32), scores

    return ExpertFeedForward(module, choose, dense)


class _LowRankQuery:
    """Queries by way of a narrower row."""

    def __init__(self, attention: Any) -> None:
        self._down, self._up = JoinedLinear([attention.q_a_proj]), JoinedLinear([attention.q_b_proj])
        self._norm = attention.q_a_layernorm

    def __call__(self, rows: mx.array) -> mx.array:
        return self._up(self._norm(self._down(rows)))


def _latent(attention: Any, rotation: Rotation) -> LatentMixer:
    low_rank = attention.q_lora_rank is not None
    return LatentMixer(
        rotation=rotation,
        scale=attention.scale,
        q_heads=attention.num_heads,
        query=_LowRankQuery(attention) if low_rank else JoinedLinear([attention.q_proj]),
        latent=JoinedLinear([attention.kv_a_proj_with_mqa]),
        latent_norm=attention.kv_a_layernorm,
        absorb=attention.embed_q,
        expand=attention.unembed_out,
        output=JoinedLinear([attention.o_proj]),
    )
