"""Feed-forward parts of experts, for steps of few rows."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU, SwitchLinear

from metal_kernels import expert_linear, expert_silu_and_mul, kernels, target
from metal_models.feed_forward import FeedForward
from metal_models.normed_rows import NormedRows


class ExpertFeedForward(FeedForward):
    """A mixture of experts whose weights are not quantised.

    Args:
        module: The model's own, which computes steps of many rows.
        choose: From normed rows to each row's experts and their scores.
        shared: From rows to what all rows get beside their experts; None for nothing.
    """

    def __init__(
        self,
        module: Any,
        choose: Callable[[mx.array], tuple[mx.array, mx.array]],
        shared: Callable[[NormedRows], mx.array] | None,
    ) -> None:
        self._module = module
        self._choose = choose
        self._shared = shared

    @staticmethod
    def possible(module: Any) -> bool:
        """Whether the experts of ``module`` are plain linear layers on one machine, gated by a SiLU."""
        experts = getattr(module, "switch_mlp", None)
        if type(experts) is not SwitchGLU or type(experts.activation) is not SwiGLU:
            return False
        if getattr(module, "sharding_group", None) is not None:
            return False
        layers = [experts.gate_proj, experts.up_proj, experts.down_proj]
        return all(type(layer) is SwitchLinear and "bias" not in layer for layer in layers)

    def __call__(self, rows: NormedRows) -> Float[mx.array, "tokens hidden"]:
        """Return what is added to the residual."""
        normed = rows.normed
        experts = self._module.switch_mlp
        gate, up, down = experts.gate_proj.weight, experts.up_proj.weight, experts.down_proj.weight
        kernel = kernels.expert_kernel(target(), normed.dtype, gate.dtype, gate.shape, normed.shape[0])
        if target() != "cpu" and isinstance(kernel, kernels.Rejected):
            out: mx.array = self._module(normed)
            return out
        ids, scores = self._choose(normed)
        mixed = expert_linear(expert_silu_and_mul(normed, gate, up, ids), down, ids, scores).sum(axis=1)
        mixed = mixed.astype(normed.dtype)
        return mixed if self._shared is None else mixed + self._shared(rows)
