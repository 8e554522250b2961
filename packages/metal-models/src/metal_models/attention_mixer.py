"""Attention over keys and values, for steps of one row per request."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from metal_kernels import decode_attention, kernels, rope_and_attend, rope_and_cache, target
from metal_kv.layer_cache import LayerCache
from metal_kv.spec import AttentionSpec
from metal_models.joined_linear import JoinedLinear
from metal_models.normed_rows import NormedRows
from metal_models.packed_plan import PlanPacker
from metal_models.rotation import Rotation
from metal_models.step_rows import Pages, StepRows
from metal_models.token_mixer import BoundMixer, TokenMixer


@dataclass(frozen=True, eq=False)
class AttentionMixer(TokenMixer):
    """Attention over rotated heads.

    Attributes:
        rotation: Of queries and keys.
        scale: Factor of the scores.
        q_heads: Heads of queries.
        qkv: All projections: queries, keys, values; with ``gated`` a gate after each query.
        output: Projection of the result.
        norms: Of query heads and key heads, or None.
        gated: Whether the result is gated by the sigmoid of a projection.
        factor: Of the result.
    """

    rotation: Rotation
    scale: float
    q_heads: int
    qkv: JoinedLinear
    output: JoinedLinear
    norms: tuple[nn.RMSNorm, nn.RMSNorm] | None
    gated: bool = False
    factor: float = 1.0
    keeps = "attn"

    @staticmethod
    def possible(module: Any, output: Any) -> bool:
        """Whether the projections of a module, of which ``output`` is the last, are of a known kind."""
        heads = [module.q_proj, module.k_proj, module.v_proj]
        return JoinedLinear.joinable(heads) and JoinedLinear.joinable([output])

    def served(self, cache: LayerCache) -> bool:
        """Whether kernels write the layer's pages in place and attend over them."""
        pages = cache.kv_cache
        if not isinstance(cache.spec, AttentionSpec) or pages.ndim != 5:
            return False
        return kernels.move_pages(pages) and isinstance(_variant(pages, self.q_heads), kernels.Accepted)

    def bind(self, cache: LayerCache, *, in_place: bool) -> "BoundAttention":
        """Return the mixer over ``cache``."""
        return BoundAttention(self, cache, Pages(cache, in_place=in_place))


class BoundAttention(BoundMixer):
    """Attention over one layer's pages."""

    def __init__(self, mixer: AttentionMixer, cache: LayerCache, pages: Pages) -> None:
        self._mixer = mixer
        self._pages = pages
        self.output = mixer.output
        shape = pages.array.shape
        window = cache.spec.window if isinstance(cache.spec, AttentionSpec) else None
        decode = _variant(pages.array, mixer.q_heads)
        per_head = decode.variant.parts * decode.variant.simdgroups if isinstance(decode, kernels.Accepted) else 1
        self.packer: PlanPacker = PlanPacker(cache.group, window, shape[3] * per_head, shape[2])

    def __call__(self, rows: NormedRows, step: StepRows) -> Float[mx.array, "tokens width"]:
        """Rotate and write keys and values, attend."""
        mixer = self._mixer
        cos_sin = step.once(mixer.rotation, lambda: mixer.rotation.cos_sin(step.positions))
        qkv = rows.through(mixer.qkv)
        options: dict[str, Any] = {"traditional": mixer.rotation.traditional}
        if mixer.norms is not None:
            q_norm, k_norm = mixer.norms
            options |= {"q_norm": q_norm.weight, "k_norm": k_norm.weight, "eps": q_norm.eps}
        attended = (
            self._gated(qkv, cos_sin, step, options) if mixer.gated else self._plain(qkv, cos_sin, step, options)
        )
        if mixer.factor != 1.0:
            attended = attended * mixer.factor
        return attended.reshape(attended.shape[0], -1)

    def _plain(self, qkv: mx.array, cos_sin: mx.array, step: StepRows, options: dict[str, Any]) -> mx.array:
        slots, plan = self.packer.slots_and_plan(step)
        scale = self._mixer.scale
        return self._pages.rewrite(
            lambda pages: rope_and_attend(qkv, cos_sin, pages, slots, plan, scale=scale, **options)
        )

    def _gated(self, qkv: mx.array, cos_sin: mx.array, step: StepRows, options: dict[str, Any]) -> mx.array:
        """Attend, then gate each query's result by what lies after it in ``qkv``."""
        slots, plan = self.packer.slots_and_plan(step)
        query = self._pages.rewrite(lambda pages: rope_and_cache(qkv, cos_sin, pages, slots, gated=True, **options))
        attended = decode_attention(query, self._pages.array, plan, scale=self._mixer.scale)
        tokens, q_heads, head_size = attended.shape
        gates = qkv[:, : 2 * q_heads * head_size].reshape(tokens, q_heads, 2, head_size)
        return attended * mx.sigmoid(gates[:, :, 1])


def _variant(
    pages: mx.array, q_heads: int
) -> kernels.Accepted[kernels.DecodeVariant | kernels.MatrixVariant] | kernels.Rejected:
    _, _, block_size, kv_heads, head_size = pages.shape
    return kernels.decode_kernel(target(), pages.dtype, pages.dtype, head_size, block_size, q_heads // kv_heads)
