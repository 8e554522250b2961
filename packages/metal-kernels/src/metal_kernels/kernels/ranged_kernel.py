"""A kernel that attends ranges of keys, and what becomes of its results."""

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.decode_plan import DecodePlan
from metal_kernels.kernels.join_ranges import join_ranges
from metal_kernels.kernels.source import PortableKernel, constants


@dataclass(frozen=True)
class RangedKernel:
    """A body in two forms: where every row has one range it writes the attention, else what is joined to it.

    Args:
        direct: The first form; takes sinks as one more input.
        split: The second.
    """

    direct: PortableKernel
    split: PortableKernel

    @classmethod
    def of(
        cls, name: str, inputs: tuple[str, ...], body: str, defines: dict[str, int], headers: tuple[str, ...]
    ) -> "RangedKernel":
        """Return both forms of ``body``, which asks for ``DIRECT``; see :class:`PortableKernel`."""
        lines = "".join(f"#define {key} {value}\n" for key, value in defines.items())
        partial, split, direct = ("partial_out", "partial_stats"), "#define DIRECT 0\n", "#define DIRECT 1\n"
        return cls(
            PortableKernel(f"{name}_direct", (*inputs, "sinks_in"), ("out",), body, lines + direct, headers=headers),
            PortableKernel(f"{name}_split", inputs, partial, body, lines + split, headers=headers),
        )

    def __call__(
        self,
        inputs: list[mx.array],
        plan: DecodePlan,
        shape: tuple[int, int],
        dtype: mx.Dtype,
        *,
        sinks: Float[mx.array, "q_heads"] | None,
        template: dict[str, int | mx.Dtype],
        per_range: int,
        threads: int,
    ) -> Float[mx.array, "decodes q_heads head_size"]:
        """Attend the rows of ``plan``.

        Args:
            inputs: Of the body, without sinks.
            plan: Which keys each row sees.
            shape: Query heads, and elements of each.
            dtype: Of the result.
            sinks: Extra logit per query head.
            template: Of the body.
            per_range: Threadgroups that take the same range.
            threads: Of a threadgroup.
        """
        threadgroups = (plan.num_ranges * per_range, 1)
        if plan.direct:
            last = constants(0.0) if sinks is None else sinks.astype(mx.float32)
            (out,) = self.direct(
                [*inputs, last],
                [((plan.num_reqs, *shape), dtype)],
                template=template | {"T": dtype, "SINKS": sinks is not None},
                threadgroups=threadgroups,
                threads=threads,
            )
            return out
        weighted, stats = self.split(
            inputs,
            [((plan.num_ranges, *shape), mx.float32), ((plan.num_ranges, shape[0], 2), mx.float32)],
            template=template,
            threadgroups=threadgroups,
            threads=threads,
        )
        return join_ranges(weighted, stats, plan, sinks, dtype)


def score_factors(scale: float, soft_cap: float | None, eps: float = 0.0) -> mx.array:
    """Return a body's factors of scores, before and after the cap's tanh, in units of log2, and a norm's epsilon."""
    log2_e = 1.4426950408889634
    if soft_cap is None:
        return constants(scale * log2_e, 0.0, eps)
    return constants(scale / soft_cap, soft_cap * log2_e, eps)
