"""What one layer of an mlx-lm model sees in place of its cache while a decode step is compiled."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from metal_kernels import concat_and_cache_mla, decode_attention, kernels, latent_decode, target, write_and_attend
from metal_kv.layer_cache import LayerCache
from metal_kv.recurrent_state import movable_pages, read_states, write_states
from metal_kv.spec import AttentionSpec, LatentSpec, RecurrentStateSpec
from metal_models.cache_view import CacheView, Step
from metal_models.compiled_step import NotCompiledError
from metal_models.packed_plan import PlanPacker
from metal_models.packed_states import StatePacker
from metal_models.sequences import StateView
from metal_models.step_rows import Packer, Pages, StepRows


class RowStep(Step):
    """The rows under way in a compiled step, whose numbers are arrays without values while it is traced.

    Args:
        in_place: Whether kernels write pages themselves; see ``Pages``.

    Attributes:
        packers: What the views read of a step's metadata.
        last_state: Orders reads of states after the last write of some, and after the step before.
        unread: Orders what follows after writes that nothing in the step reads, by the ``id`` of a view.
    """

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.packers: list[Packer] = []
        self.last_state: mx.array | None = None
        self.unread: dict[int, mx.array] = {}
        self._rows: StepRows | None = None
        self._begin: mx.array | None = None

    @property
    def rows(self) -> StepRows:
        """What the layers of the step share."""
        assert self._rows is not None
        return self._rows

    def open(self, token_ids: mx.array, rows: StepRows) -> None:
        """Make ``rows`` those that the views speak of; ``token_ids`` follow from the step before."""
        self._rows, self.positions = rows, rows.positions
        self._begin = self.last_state = token_ids

    def after_writes(self, hidden: mx.array) -> mx.array:
        """Return ``hidden``, to be had when all states and rows of the step are written.

        Raises:
            NotCompiledError: Some are not.
        """
        if any(isinstance(view, DecodeView) and not view.written for view in self.views):
            raise NotCompiledError("a layer stores keys that nothing reads")
        waits = list(self.unread.values())
        if self.last_state is not None and self.last_state is not self._begin:
            waits.append(self.last_state)
        if not waits:
            return hidden
        order = reduce(mx.add, (token.reshape(-1)[:1] for token in waits))
        return hidden + (0 * order).astype(hidden.dtype)

    def end(self) -> None:
        """Drop what the layers left."""
        super().end()
        self._rows, self._begin, self.last_state, self.unread = None, None, None, {}


class _RowView(CacheView):
    def __init__(self, step: RowStep, window: int | None, packer: PlanPacker) -> None:
        super().__init__(step, window)
        self._row_step = step
        self._packer = packer
        step.packers.append(packer)

    def read(self, use: Callable[..., mx.array], like: mx.array) -> mx.array:
        """Refuse.

        Raises:
            NotCompiledError: Always.
        """
        raise NotCompiledError("a layer picks keys by code that reads lengths on the host")

    @property
    def max_context(self) -> int:
        """Keys that requests of the step have at most."""
        return self._packer.most_keys(self._row_step.rows)


class DecodeView(_RowView):
    """Keys and values of one layer.

    Rows are written by the kernel that attends to them first.

    Args:
        step: Shared by all views of a model.
        window: How many latest tokens the layer's own cache would keep, or None for all.
        cache: The pool's layer.
        sizes: Width of the model's keys, and of its values.
        packer: Of the layer's rows, all of which are read with its window.
    """

    def __init__(
        self, step: RowStep, window: int | None, cache: LayerCache, sizes: tuple[int, int], packer: PlanPacker
    ) -> None:
        super().__init__(step, window, packer)
        self._sizes = sizes
        self._pages = Pages(cache, in_place=step.in_place)
        self._written: mx.array | None = None

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: object = None,
        soft_cap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return attention of every row over its request's keys."""
        if self.window_of(mask) not in (None, self._packer.window):
            raise NotCompiledError("a layer is read with several windows")
        query = self._widened(queries)
        slots, plan = self._packer.slots_and_plan(self._row_step.rows)
        options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks}
        if self._written is None:
            key, value = map(self._widened, self.keys_and_values())
            out = self._written = self._pages.rewrite(
                lambda pages: write_and_attend(query, key, value, pages, slots, plan, **options)
            )
        else:
            out = decode_attention(query, self._pages.array, plan, order_token=self._written, **options)
        return out[..., : self._sizes[1]][:, :, None]

    @property
    def written(self) -> bool:
        """Whether all rows that the model stored here are on their way to the pages."""
        return self.keys is None or self._written is not None

    def forget(self) -> None:
        """Let go of the step's rows and of what orders reads after their write."""
        super().forget()
        self._written = None

    def _widened(self, array: mx.array) -> mx.array:
        rows = array.squeeze(2)
        padding = max(self._sizes) - rows.shape[-1]
        return mx.pad(rows, [(0, 0), (0, 0), (0, padding)]) if padding else rows


class LatentDecodeView(_RowView):
    """Latents of one layer; see ``latent_layer.LatentView`` for how rotary keys travel.

    Args:
        step: Shared by all views of a model.
        cache: The pool's layer.
        rope_size: Width of the rotary part of a key.
        packer: Of the layer's rows.
    """

    def __init__(self, step: RowStep, cache: LayerCache, rope_size: int, packer: PlanPacker) -> None:
        super().__init__(step, None, packer)
        self._dtype = cache.spec.page_dtype
        self._pages = Pages(cache, in_place=step.in_place)
        self._identity = mx.eye(rope_size, dtype=self._dtype)[None, None]
        mx.eval(self._identity)
        self._order_token: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write latents ``[tokens, 1, 1, latent]`` and rope keys; return the latents and the identity."""
        slots, _ = self._packer.slots_and_plan(self._row_step.rows)
        latent, rope = keys[:, 0, 0].astype(self._dtype), values[:, 0, 0].astype(self._dtype)

        def write(pages: mx.array) -> tuple[mx.array, mx.array]:
            written, order_token = concat_and_cache_mla(latent, rope, pages, slots[: latent.shape[0]])
            return order_token, written

        self._order_token = self._row_step.unread[id(self)] = self._pages.rewrite(write)
        super().update_and_fetch(keys, values)
        return keys, self._identity.astype(values.dtype)

    def attend_latent(self, queries: mx.array, rope_scores: mx.array, *, scale: float) -> mx.array:
        """Return attention of every row over its request's latents."""
        _, plan = self._packer.slots_and_plan(self._row_step.rows)
        out = latent_decode(
            queries.squeeze(2),
            rope_scores.squeeze(2) / scale,
            self._pages.array,
            plan,
            scale=scale,
            order_token=self._order_token,
        )
        self._row_step.unread.pop(id(self), None)
        return out[:, :, None]

    def forget(self) -> None:
        """Let go of the step's rows and of the token that orders its reads after its writes."""
        super().forget()
        self._order_token = None


class StateDecodeView(StateView):
    """States of one recurrent layer, of requests that all continue one.

    Args:
        step: Shared by all views of a model.
        cache: The pool's layer.
        size: Arrays of a state.
    """

    def __init__(self, step: RowStep, cache: LayerCache, size: int) -> None:
        super().__init__(step, cache, size)
        assert isinstance(cache.spec, RecurrentStateSpec)
        self._row_step = step
        self._spec = cache.spec
        self._packer = StatePacker(cache.group, cache.spec.block_size, nowhere=-1)
        self._pages = Pages(cache, in_place=step.in_place, seen_as=self._movable)
        step.packers.append(self._packer)

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module with the states of all requests and keep those that it leaves."""
        before, after = self._packer.before_and_after(self._row_step.rows)
        states = read_states(self._pages.array, before, self._spec, self._row_step.last_state)
        arrays: Any = ArraysCache(len(states))
        arrays.cache = list(states)
        args = tuple(arrays if value is self else value for value in args)
        output = call(*args, **{name: arrays if value is self else value for name, value in kwargs.items()})

        def write(pages: mx.array) -> tuple[mx.array, mx.array]:
            written, order_token = write_states(pages, after, self._spec, arrays.cache, states[0])
            return order_token, written

        self._row_step.last_state = self._pages.rewrite(write)
        return output

    def _movable(self, pages: mx.array) -> mx.array:
        shape, dtype = movable_pages(pages.shape[0], self._spec.page_size_bytes)
        return pages.reshape(pages.shape[0], -1).view(dtype).reshape(shape)


def attention_packer(cache: LayerCache, window: int | None, q_heads: int, *, in_place: bool) -> PlanPacker:
    """Return what packs the rows of a layer with keys and values.

    Args:
        cache: The pool's layer.
        window: Keys that its rows see at most.
        q_heads: Heads of queries.
        in_place: Whether kernels are to write and read the pages.

    Raises:
        NotCompiledError: They do not.
    """
    pages, spec = cache.kv_cache, cache.spec
    if not isinstance(spec, AttentionSpec) or spec.rows or pages.ndim != 5:
        raise NotCompiledError("compiled steps of modules read no quantised rows")
    _, _, block_size, kv_heads, head_size = pages.shape
    decode = kernels.decode_kernel(target(), pages.dtype, pages.dtype, head_size, block_size, q_heads // kv_heads)
    if in_place:
        _require(kernels.move_pages(pages), decode)
    per_head = decode.variant.parts * decode.variant.simdgroups if isinstance(decode, kernels.Accepted) else 1
    return PlanPacker(cache.group, window, kv_heads * per_head, block_size)


def latent_packer(cache: LayerCache, q_heads: int, *, in_place: bool) -> PlanPacker:
    """Return what packs the rows of a layer with latents; see :func:`attention_packer`.

    Args:
        cache: The pool's layer.
        q_heads: Heads of queries; 0 for rows that are only written.
        in_place: Whether kernels are to write and read the pages.

    Raises:
        NotCompiledError: They do not.
    """
    pages, spec = cache.kv_cache, cache.spec
    assert isinstance(spec, LatentSpec)
    decode = kernels.mla_decode_kernel(target(), spec.dtype, spec.dtype, spec.latent_size, spec.rope_size)
    if in_place:
        _require(kernels.move_pages(pages), decode if q_heads else None)
    per_range = 1
    if q_heads and isinstance(decode, kernels.Accepted):
        per_range = -(-q_heads // decode.variant.heads) * decode.variant.simdgroups
    return PlanPacker(cache.group, None, per_range, pages.shape[1], latent=True)


def _require(moved: bool, decode: object) -> None:
    if not moved:
        raise NotCompiledError("no kernel writes a layer's pages in place")
    if isinstance(decode, kernels.Rejected):
        raise NotCompiledError(decode.why)
