"""Feed-forward parts of experts, for steps of few rows."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchLinear

from metal_kernels import StackedWeights, expert_linear, expert_silu_and_mul, serves_experts, target
from metal_models.feed_forward import FeedForward
from metal_models.normed_rows import NormedRows


class ExpertFeedForward(FeedForward):
    """A mixture of experts.

    Args:
        module: The model's own, which computes steps of many rows.
        choose: From normed rows to each row's experts and their scores.
        chosen: How many experts that are.
        shared: From rows to what all of them get beside their experts; None for nothing.
    """

    def __init__(
        self,
        module: Any,
        choose: Callable[[NormedRows], tuple[mx.array, mx.array]],
        chosen: int,
        shared: Callable[[NormedRows], mx.array] | None,
    ) -> None:
        self._module = module
        self._choose = choose
        self._chosen = chosen
        self._shared = shared
        experts = module.switch_mlp
        self._weights = [stacked_weights(layer) for layer in (experts.gate_proj, experts.up_proj, experts.down_proj)]

    @staticmethod
    def possible(module: Any) -> bool:
        """Whether the experts of ``module`` are linear layers of a known kind on one machine, gated by a SiLU."""
        experts = getattr(module, "switch_mlp", None)
        return getattr(module, "sharding_group", None) is None and ExpertFeedForward.known(experts)

    @staticmethod
    def known(experts: Any) -> bool:
        """Whether ``experts`` are linear layers of a known kind, gated by a SiLU."""
        if type(experts) is not SwitchGLU or type(experts.activation) is not SwiGLU:
            return False
        return all(_known(layer) for layer in (experts.gate_proj, experts.up_proj, experts.down_proj))

    def __call__(self, rows: NormedRows) -> Float[mx.array, "tokens hidden"]:
        """Return what is added to the residual, by the model's own module."""
        out: mx.array = self._module(rows.normed)
        return out

    def add_to(self, rows: NormedRows, norm: Any) -> NormedRows:
        """Return the rows after the experts, seen through ``norm``."""
        normed = rows.normed
        if target() != "cpu" and not serves_experts(normed.dtype, self._weights, normed.shape[0], self._chosen):
            return super().add_to(rows, norm)
        gate, up, down = self._weights
        ids, scores = self._choose(rows)
        mixed = expert_linear(expert_silu_and_mul(normed, gate, up, ids), down, ids, scores)
        beside = None if self._shared is None else self._shared(rows)
        return rows.plus(mixed, None, norm, beside)


def _known(layer: Any) -> bool:
    if type(layer) is SwitchLinear:
        return "bias" not in layer
    return type(layer) is QuantizedSwitchLinear and "bias" not in layer and layer.mode == "affine"


def stacked_weights(layer: Any) -> StackedWeights:
    """Return the weights of experts' linear layers of a known kind."""
    if type(layer) is SwitchLinear:
        return StackedWeights(layer.weight)
    return StackedWeights(layer.weight, layer.scales, layer.biases, layer.bits, layer.group_size)
