"""Multi-head latent attention, for steps of one row per request."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from metal_kernels import kernels, latent_decode, latent_rope_and_cache, target
from metal_kv.layer_cache import LayerCache
from metal_kv.spec import LatentSpec
from metal_models.head_linear import HeadLinear
from metal_models.joined_linear import JoinedLinear
from metal_models.normed_rows import NormedRows
from metal_models.packed_plan import PlanPacker
from metal_models.rotation import Rotation
from metal_models.step_rows import Pages, StepRows
from metal_models.token_mixer import BoundMixer, TokenMixer


@dataclass(frozen=True, eq=False)
class LatentMixer(TokenMixer):
    """Attention with absorbed queries over latents.

    Attributes:
        rotation: Of the rotary parts.
        scale: Factor of the scores.
        q_heads: Heads of queries.
        project: From rows to all query heads, and to a latent and its rotary key.
        latent_norm: Of the latent.
        absorb: From the parts of queries that are not rotated to queries that meet latents.
        expand: From weighted latents to values.
        output: Projection of the result.
    """

    rotation: Rotation
    scale: float
    q_heads: int
    project: Callable[[NormedRows], tuple[mx.array, mx.array]]
    latent_norm: nn.RMSNorm
    absorb: HeadLinear
    expand: HeadLinear
    output: JoinedLinear
    keeps = "attn"

    def served(self, cache: LayerCache) -> bool:
        """Whether kernels write the layer's pages in place and attend over them."""
        return kernels.move_pages(cache.kv_cache) and isinstance(_variant(cache), kernels.Accepted)

    def bind(self, cache: LayerCache, *, in_place: bool) -> "BoundLatentAttention":
        """Return the mixer over ``cache``."""
        return BoundLatentAttention(self, cache, Pages(cache, in_place=in_place))


class BoundLatentAttention(BoundMixer):
    """Latent attention over one layer's pages."""

    def __init__(self, mixer: LatentMixer, cache: LayerCache, pages: Pages) -> None:
        self._mixer = mixer
        self._pages = pages
        self.output = mixer.output
        decode = _variant(cache)
        per_range = 1
        if isinstance(decode, kernels.Accepted):
            per_range = -(-mixer.q_heads // decode.variant.heads) * decode.variant.simdgroups
        self.packer: PlanPacker = PlanPacker(cache.group, None, per_range, pages.array.shape[1], latent=True)

    def __call__(self, rows: NormedRows, step: StepRows) -> Float[mx.array, "tokens width"]:
        """Rotate and write the latents, attend with absorbed queries."""
        mixer, tokens = self._mixer, step.positions.size
        slots, plan = self.packer.slots_and_plan(step)
        cos_sin = step.once(mixer.rotation, lambda: mixer.rotation.cos_sin(step.positions))
        query, latent = mixer.project(rows)

        def write(pages: mx.array) -> tuple[mx.array, mx.array]:
            return latent_rope_and_cache(
                query,
                latent,
                cos_sin,
                pages,
                slots,
                q_heads=mixer.q_heads,
                norm=mixer.latent_norm.weight,
                eps=mixer.latent_norm.eps,
                traditional=mixer.rotation.traditional,
            )

        rope = self._pages.rewrite(write)
        absorbed = mixer.absorb(query.reshape(tokens, mixer.q_heads, -1))
        attended = latent_decode(absorbed, rope, self._pages.array, plan, scale=mixer.scale)
        return mixer.expand(attended).reshape(tokens, -1)


def _variant(cache: LayerCache) -> kernels.Accepted[kernels.LatentVariant] | kernels.Rejected:
    spec = cache.spec
    if not isinstance(spec, LatentSpec):
        return kernels.Rejected("the layer keeps no latents")
    return kernels.mla_decode_kernel(target(), spec.dtype, spec.dtype, spec.latent_size, spec.rope_size)
