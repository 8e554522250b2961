"""How models rotate queries and keys, as cosines and sines of a step's positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import rope_utils

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


def rotations_of(attention: Sequence[Any]) -> dict[int, Rotation] | None:
    """Return the rotation of every attention module, by the module's ``id``; None for a rotation of unknown kind."""
    rotations = find_rotations([module.rope for module in attention])
    if rotations is None:
        return None
    return {id(module): rotation for module, rotation in zip(attention, rotations, strict=True)}


@cache
def unrotated(head_size: int) -> Rotation:
    """Return the rotation of heads that are not rotated: by nothing."""
    return Rotation(_as_they_are, head_size, False)


def _as_they_are(rows: mx.array, offset: mx.array) -> mx.array:
    del offset
    return rows


@cache
def _unit_rows(tokens: int, size: int, traditional: bool) -> mx.array:
    """Return rows ``[tokens, 1, 1, size]`` of which each pair that rotates together is 1, 0."""
    at = np.arange(size)
    unit = (at % 2 == 0 if traditional else at < size // 2).astype(np.float32)
    # Contiguous, because MLX's GPU kernel would write all rows of a broadcast array to the same place.
    return mx.array(np.ascontiguousarray(np.broadcast_to(unit, (tokens, 1, 1, size))))
