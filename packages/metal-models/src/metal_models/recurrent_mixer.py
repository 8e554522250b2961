"""Gated delta nets and short convolutions, for steps of one row per request."""

from abc import abstractmethod
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32

from metal_kernels import GatedDeltaRows, gated_delta_decode, kernels, short_conv_decode, target
from metal_kv.layer_cache import LayerCache
from metal_kv.spec import RecurrentStateSpec
from metal_models.joined_linear import JoinedLinear
from metal_models.joined_rows import JoinedRows
from metal_models.normed_rows import NormedRows
from metal_models.packed_states import StatePacker
from metal_models.step_rows import Pages, StepRows
from metal_models.token_mixer import BoundMixer, TokenMixer


class RecurrentMixer(TokenMixer):
    """A layer that carries a state from token to token."""

    keeps = "state"

    output: JoinedLinear

    @abstractmethod
    def advance(
        self, rows: NormedRows, pages: mx.array, blocks: Int32[mx.array, "slots"]
    ) -> tuple[Float[mx.array, "tokens width"], mx.array]:
        """Return the rows that ``output`` takes, and the pages with the states after them."""

    def bind(self, cache: LayerCache, *, in_place: bool) -> "BoundRecurrence":
        """Return the mixer over ``cache``."""
        return BoundRecurrence(self, cache, Pages(cache, in_place=in_place))


class BoundRecurrence(BoundMixer):
    """A recurrence over one layer's states."""

    def __init__(self, mixer: RecurrentMixer, cache: LayerCache, pages: Pages) -> None:
        self._mixer = mixer
        self._pages = pages
        self.output = mixer.output
        self.packer = StatePacker(cache.group, cache.spec.block_size)

    def __call__(self, rows: NormedRows, step: StepRows) -> Float[mx.array, "tokens width"]:
        """Advance every request's state by a token."""
        _, blocks = step.parts[self.packer]
        return self._pages.rewrite(lambda pages: self._mixer.advance(rows, pages, blocks))


@dataclass(frozen=True, eq=False)
class GatedDeltaMixer(RecurrentMixer):
    """A gated delta net.

    Attributes:
        layout: What the projections hold.
        projections: Of queries, keys, values, gates and numbers.
        conv: Weights of the convolution, ``[channels, taps]``.
        gates: See ``metal_kernels.gated_delta_decode``.
        norm: Weights of the norm.
        eps: Of the norm.
        output: Projection of the result.
    """

    layout: GatedDeltaRows
    projections: JoinedRows
    conv: mx.array
    gates: mx.array
    norm: mx.array
    eps: float
    output: JoinedLinear

    def served(self, cache: LayerCache) -> bool:
        """Whether a kernel advances the states in place."""
        spec = cache.spec
        if not isinstance(spec, RecurrentStateSpec) or spec.page_dtype != mx.uint32:
            return False
        if spec.shapes != self.layout.state_shapes or spec.dtypes != (self.conv.dtype, mx.float32):
            return False
        words = spec.page_shape[0]
        decode = kernels.gated_delta_kernel(target(), self.conv.dtype, words, self.layout)
        return isinstance(decode, kernels.Accepted) and kernels.writes_in_place()

    def advance(
        self, rows: NormedRows, pages: mx.array, blocks: Int32[mx.array, "slots"]
    ) -> tuple[Float[mx.array, "tokens width"], mx.array]:
        """Return the gated and normed values, and the pages."""
        weights = {"conv": self.conv, "gates": self.gates, "norm": self.norm}
        return gated_delta_decode(self.projections(rows), pages, blocks, self.layout, eps=self.eps, **weights)


@dataclass(frozen=True, eq=False)
class ShortConvMixer(RecurrentMixer):
    """A gated short convolution.

    Attributes:
        projections: What gates the input, what gates the output, and the input.
        conv: The convolution.
        output: Projection of the result.
    """

    projections: JoinedLinear
    conv: nn.Conv1d
    output: JoinedLinear

    def served(self, cache: LayerCache) -> bool:
        """Whether a kernel advances the states in place."""
        spec, weight = cache.spec, self.conv.weight
        if not isinstance(spec, RecurrentStateSpec) or spec.page_dtype != mx.uint32 or spec.dtypes != (weight.dtype,):
            return False
        decode = kernels.short_conv_kernel(target(), weight.dtype, weight.shape[0], weight.shape[1])
        return isinstance(decode, kernels.Accepted) and kernels.writes_in_place()

    def advance(
        self, rows: NormedRows, pages: mx.array, blocks: Int32[mx.array, "slots"]
    ) -> tuple[Float[mx.array, "tokens width"], mx.array]:
        """Return the gated convolution, and the pages."""
        weight = self.conv.weight.squeeze(-1)
        bias = self.conv.bias if "bias" in self.conv else None
        return short_conv_decode(rows.through(self.projections), pages, blocks, conv=weight, bias=bias)
