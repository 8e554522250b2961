"""Mamba 2, for steps of one row per request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import Mamba2Rows, kernels, mamba2_decode, target
from metal_kv.layer_cache import LayerCache
from metal_kv.spec import RecurrentStateSpec
from metal_models.joined_linear import JoinedLinear
from metal_models.normed_rows import NormedRows
from metal_models.recurrent_mixer import RecurrentMixer


@dataclass(frozen=True, eq=False)
class Mamba2Mixer(RecurrentMixer):
    """A selective state space.

    Attributes:
        layout: What the projection holds.
        projection: Of gates, inputs of the convolution and time steps.
        conv: Weights of the convolution, ``[channels, taps]``.
        bias: Of the convolution.
        heads: See ``metal_kernels.mamba2_decode``.
        limits: Likewise.
        norm: From the gated values to what ``output`` takes.
        output: Projection of the result.
    """

    layout: Mamba2Rows
    projection: JoinedLinear
    conv: mx.array
    bias: mx.array | None
    heads: mx.array
    limits: tuple[float, float]
    norm: Callable[[mx.array], mx.array]
    output: JoinedLinear

    @classmethod
    def of(cls, module: Any, norm: Callable[[mx.array], mx.array]) -> "Mamba2Mixer":
        """Return the mixer of one of mlx-lm's modules, which name their parts alike.

        Args:
            module: The module.
            norm: See the attribute.
        """
        numbers = [module.dt_bias, -mx.exp(module.A_log.astype(mx.float32)), module.D]
        heads = mx.concatenate([number.astype(mx.float32) for number in numbers])
        heads = mx.pad(heads, (0, max(0, 8 - heads.size)))
        conv = mx.contiguous(module.conv1d.weight.squeeze(-1))
        mx.eval(heads, conv)
        sizes = (module.num_heads, module.head_dim, module.n_groups, module.ssm_state_size, module.conv_kernel_size)
        return cls(
            layout=Mamba2Rows(*sizes),
            projection=JoinedLinear([module.in_proj]),
            conv=conv,
            bias=module.conv1d.bias if "bias" in module.conv1d else None,
            heads=heads,
            limits=(float(module.time_step_limit[0]), float(module.time_step_limit[1])),
            norm=norm,
            output=JoinedLinear([module.out_proj]),
        )

    @staticmethod
    def possible(module: Any) -> bool:
        """Whether the module's linear layers are of a known kind."""
        return JoinedLinear.joinable([module.in_proj]) and JoinedLinear.joinable([module.out_proj])

    def served(self, cache: LayerCache) -> bool:
        """Whether a kernel advances the states in place."""
        spec = cache.spec
        if not isinstance(spec, RecurrentStateSpec) or spec.page_dtype != mx.uint32:
            return False
        if spec.shapes != self.layout.state_shapes or spec.dtypes != (self.conv.dtype, mx.float32):
            return False
        decode = kernels.mamba2_kernel(target(), self.conv.dtype, spec.page_shape[0], self.layout)
        return isinstance(decode, kernels.Accepted) and kernels.writes_in_place()

    def advance(
        self, rows: NormedRows, pages: mx.array, blocks: Int32[mx.array, "slots"]
    ) -> tuple[Float[mx.array, "tokens width"], mx.array]:
        """Return the gated and normed values, and the pages."""
        values, pages = mamba2_decode(
            rows.through(self.projection),
            pages,
            blocks,
            self.layout,
            conv=self.conv,
            bias=self.bias,
            heads=self.heads,
            limits=self.limits,
            gated=True,
        )
        return self.norm(values), pages
