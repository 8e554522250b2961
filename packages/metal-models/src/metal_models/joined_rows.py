"""Linear layers that take the same rows: one matmul for neighbours of one kind."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from metal_models.joined_linear import JoinedLinear
from metal_models.normed_rows import NormedRows


class JoinedRows:
    """The outputs of several linear layers, side by side.

    Args:
        layers: Linear layers, not all of one kind: quantised models often leave small projections as they are.
            Changed in place as by ``JoinedLinear``.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        runs: list[list[Any]] = []
        for layer in layers:
            if runs and JoinedLinear.joinable([*runs[-1], layer]):
                runs[-1].append(layer)
            else:
                runs.append([layer])
        self._parts = [JoinedLinear(run) for run in runs]

    @staticmethod
    def possible(layers: Sequence[Any]) -> bool:
        """Whether all of ``layers`` are linear."""
        return all(JoinedLinear.joinable([layer]) for layer in layers)

    def __call__(self, rows: NormedRows) -> mx.array:
        """Return the outputs ``[tokens, …]`` of all layers, one after the other."""
        outputs = [rows.through(part) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
