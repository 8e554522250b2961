"""The decode step of models built like Llama, as few operations: one row per request, kernels between matmuls.

The plain path, mlx-lm's own modules over views of the cache, is the specification.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import rope_utils

from metal_kernels import add_rms_norm, silu_and_mul
from metal_models.joined_linear import JoinedLinear

# Model files of mlx-lm whose layers are: norm, attention over rotated heads, sum, norm, SiLU-gated MLP, sum; all norms
# divide by the root mean square. A file's line says whether its queries and keys are normalised before the rotation.
_FAMILIES = {"llama": False, "qwen2": False, "qwen3": True}

_FEW_ROWS = 32  # of linear layers that are bound by memory and launches

# Rotary modules -> the attribute that says how many elements of a head they rotate.
_ROPES: dict[type[nn.Module], str] = {
    nn.RoPE: "dims",
    rope_utils.Llama3RoPE: "dims",
    rope_utils.YarnRoPE: "dims",
    rope_utils.SuScaledRoPE: "dim",
}


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a layer's queries and keys are rotated.

    Attributes:
        rope: The model's module.
        size: Elements of a head that it rotates.
        traditional: Whether it rotates neighbours.
    """

    rope: Any
    size: int
    traditional: bool

    def cos_sin(self, positions: mx.array) -> mx.array:
        """Return cosines, then sines, ``[tokens, size]`` in float32: what the module makes of unit vectors."""
        rows = _unit_rows(positions.shape[0], self.size, self.traditional)
        turned: mx.array = self.rope(rows, offset=positions).reshape(-1, self.size)
        if not self.traditional:
            return turned
        return mx.concatenate([turned[:, ::2], turned[:, 1::2]], axis=1)


@dataclass(frozen=True, eq=False)
class DecodeLayer:
    """One layer of a decode program."""

    rotation: Rotation
    scale: float
    q_heads: int
    qkv: JoinedLinear
    output: JoinedLinear
    gate_up: JoinedLinear
    down: JoinedLinear
    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None
    post_norm: nn.RMSNorm
    next_norm: nn.RMSNorm


class DecodeProgram:
    """A model's layers, in a form that computes one row per request.

    Args:
        backbone: From token ids to hidden rows; see :func:`find_backbone`. Its linear layers get new memory.
        layers: Its layers.
    """

    def __init__(self, backbone: Any, layers: list[DecodeLayer]) -> None:
        self._embed: Any = backbone.embed_tokens
        self._first_norm: Any = backbone.layers[0].input_layernorm
        self.layers = layers

    @property
    def few_rows(self) -> int:
        """Up to how many rows kernels compute whole linear layers; 0 if not all of them."""
        dtype = self._first_norm.weight.dtype
        fits = all(
            layer.qkv.fuses(dtype, _FEW_ROWS, normed=True)
            and layer.output.fuses(dtype, _FEW_ROWS)
            and layer.gate_up.fuses(dtype, _FEW_ROWS, normed=True, gated=True)
            and layer.down.fuses(dtype, _FEW_ROWS)
            for layer in self.layers
        )
        return _FEW_ROWS if fits else 0

    def __call__(
        self, token_ids: mx.array, attend: Callable[[int, DecodeLayer, mx.array], mx.array], few_rows: int
    ) -> mx.array:
        """Return hidden rows ``[tokens, hidden]`` of ids ``[tokens]``.

        Args:
            token_ids: One id for each row.
            attend: Takes a layer's number, the layer, and the rows' queries, keys and values side by side; returns
                ``[tokens, q_heads, head_size]``.
            few_rows: Up to how many rows norms, activations and sums are part of the linear layers.
        """
        residual: mx.array = self._embed(token_ids)
        if token_ids.shape[0] <= few_rows:
            return self._fused(residual, attend)
        rows: mx.array = self._first_norm(residual)
        for index, layer in enumerate(self.layers):
            attended = attend(index, layer, layer.qkv(rows))
            rows = layer.output(attended.reshape(attended.shape[0], -1))
            rows, residual = _add_norm(rows, residual, layer.post_norm)
            rows = layer.down(silu_and_mul(layer.gate_up(rows)))
            rows, residual = _add_norm(rows, residual, layer.next_norm)
        return rows

    def _fused(self, residual: mx.array, attend: Callable[[int, DecodeLayer, mx.array], mx.array]) -> mx.array:
        """Return hidden rows, from embeddings, in as few operations as there are."""
        norm = self._first_norm
        for index, layer in enumerate(self.layers):
            attended = attend(index, layer, layer.qkv.fused(residual, norm=norm))
            residual = layer.output.fused(attended.reshape(attended.shape[0], -1), residual=residual)
            rows = layer.gate_up.fused(residual, norm=layer.post_norm, gated=True)
            residual, norm = layer.down.fused(rows, residual=residual), layer.next_norm
        hidden: mx.array = norm(residual)
        return hidden


def decode_program(model: nn.Module) -> DecodeProgram | None:
    """Return the decode program of ``model``; None if its family has none or a module is not as its family's are.

    Joins linear layers in place; the model computes as before.
    """
    wrapped: Any = getattr(model, "language_model", model)  # what wraps it does nothing to a decode step
    model = wrapped
    file = type(model).__module__.rpartition(".")[2]
    backbone: Any = getattr(model, "model", None)
    if not type(model).__module__.startswith("mlx_lm.models.") or file not in _FAMILIES or not backbone.layers:
        return None
    blocks, normed = backbone.layers, _FAMILIES[file]
    rotations = find_rotations([block.self_attn.rope for block in blocks])
    if rotations is None or not all(_as_expected(block) for block in blocks):
        return None
    norms = [block.input_layernorm for block in blocks[1:]] + [backbone.norm]
    return DecodeProgram(
        backbone,
        [
            _layer(block, rotation, norm, normed)
            for block, rotation, norm in zip(blocks, rotations, norms, strict=True)
        ],
    )


def _as_expected(block: Any) -> bool:
    attention, mlp = block.self_attn, block.mlp
    groups = (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )
    return all(JoinedLinear.joinable(group) for group in groups)


def _layer(block: Any, rotation: Rotation, next_norm: nn.RMSNorm, normed: bool) -> DecodeLayer:
    attention, mlp = block.self_attn, block.mlp
    return DecodeLayer(
        rotation=rotation,
        scale=attention.scale,
        q_heads=attention.n_heads,
        qkv=JoinedLinear([attention.q_proj, attention.k_proj, attention.v_proj]),
        output=JoinedLinear([attention.o_proj]),
        gate_up=JoinedLinear([mlp.gate_proj, mlp.up_proj]),
        down=JoinedLinear([mlp.down_proj]),
        q_norm=attention.q_norm if normed else None,
        k_norm=attention.k_norm if normed else None,
        post_norm=block.post_attention_layernorm,
        next_norm=next_norm,
    )


def find_rotations(ropes: list[Any]) -> list[Rotation] | None:
    """Return one rotation for each layer, the same object where layers rotate alike; None for an unknown kind."""
    distinct: list[Rotation] = []
    rotations = []
    for rope in ropes:
        if type(rope) not in _ROPES:
            return None
        known = next((rotation for rotation in distinct if _alike(rotation.rope, rope)), None)
        if known is None:
            known = Rotation(rope, getattr(rope, _ROPES[type(rope)]), getattr(rope, "traditional", False))
            distinct.append(known)
        rotations.append(known)
    return rotations


def _alike(one: Any, other: Any) -> bool:
    """Whether two rotary modules have the same attributes and arrays."""
    if type(one) is not type(other) or one.keys() != other.keys():
        return False
    ours, theirs = vars(one), vars(other)
    values = [(ours[name], theirs.get(name)) for name in ours] + [(one[name], other[name]) for name in one]
    return all(
        mx.array_equal(a, b).item() if isinstance(a, mx.array) and isinstance(b, mx.array) else a == b
        for a, b in values
    )


def _add_norm(rows: mx.array, residual: mx.array, norm: Any) -> tuple[mx.array, mx.array]:
    return add_rms_norm(rows, residual, norm.weight, norm.eps)


@cache
def _unit_rows(tokens: int, size: int, traditional: bool) -> mx.array:
    """Return rows ``[tokens, 1, 1, size]`` of which each pair that rotates together is 1, 0."""
    at = np.arange(size)
    unit = (at % 2 == 0 if traditional else at < size // 2).astype(np.float32)
    # Contiguous, because MLX's GPU kernel would write all rows of a broadcast array to the same place.
    return mx.array(np.ascontiguousarray(np.broadcast_to(unit, (tokens, 1, 1, size))))
