"""Steps of one row per request for layers of several kinds: a compiled graph for each bucket of sizes."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels import target
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.layer_cache import LayerCache
from metal_kv.pool import KVCachePool
from metal_kv.spec import RecurrentStateSpec
from metal_models.mixed_program import MixedProgram
from metal_models.step_memory import BUCKETS, MIN_ELEMENTS, StepMemory, bucket, on_device
from metal_models.token_mixer import BoundMixer, StepRows

_Sizes = tuple[int, tuple[tuple[Hashable, int], ...]]
"""Padded requests; for each key of the mixers their sizes and how many numbers they packed."""


class MixedStep:
    """A program bound to the layers of a pool.

    Args:
        program: The model's layers.
        caches: The pool's layers, in the order of the mixers.
        compiled: Whether steps are compiled and kernels write in place; else they run on any device, through the
            kernels' twins.
    """

    def __init__(self, program: MixedProgram, caches: Sequence[LayerCache], *, compiled: bool) -> None:
        self._program = program
        mixers = [mixer for layer in program.layers for mixer in layer.caches("").values()]
        self._mixers = [mixer.bind(cache, in_place=compiled) for mixer, cache in zip(mixers, caches, strict=True)]
        self._packers: dict[Hashable, BoundMixer] = {mixer.key: mixer for mixer in reversed(self._mixers)}
        self._states = [cache for cache in caches if isinstance(cache.spec, RecurrentStateSpec)]
        self._compiled = compiled
        self._memory = StepMemory()
        self._graphs: dict[_Sizes, Callable[[mx.array, mx.array], mx.array]] = {}
        self._last: mx.array | None = None

    def serves(self, metadata: Sequence[AttentionMetadata]) -> bool:
        """Whether every request of the step has one row, and there are not too many."""
        batch = metadata[0].batch
        return 0 < batch.num_reqs <= BUCKETS[-1] and batch.num_decodes == batch.num_reqs

    def __call__(
        self, token_ids: Int32[mx.array, "tokens"], metadata: Sequence[AttentionMetadata]
    ) -> Float[mx.array, "tokens hidden"]:
        """Write the step's rows and states and return its hidden rows, lazily.

        Args:
            token_ids: One id for each request.
            metadata: One per cache group.
        """
        rows = metadata[0].batch.num_reqs
        sizes, packed = self._packed(metadata)
        graph = self._graphs.get(sizes)
        if graph is None:
            graph = partial(self._run, sizes)
            graph = self._graphs[sizes] = mx.compile(graph) if self._compiled else graph
        token_ids = self._after_states(token_ids)
        if rows < sizes[0]:
            token_ids = mx.pad(token_ids, (0, sizes[0] - rows))
        slot = self._memory.filled(packed)
        slot.reader = hidden = graph(token_ids, slot.array)
        self._keep_order(hidden)
        return hidden[:rows] if rows < sizes[0] else hidden

    def _packed(self, metadata: Sequence[AttentionMetadata]) -> tuple[_Sizes, Int32[np.ndarray, "elements"]]:
        """Return positions, then what the mixers pack, as one array: it travels to the device at once."""
        num_reqs = metadata[0].batch.num_reqs
        reqs = bucket(num_reqs)
        positions = np.zeros(max(MIN_ELEMENTS, reqs), np.int32)
        positions[:num_reqs] = metadata[0].places.host
        parts, sizes = [positions], []
        for mixer in self._packers.values():
            part_sizes, part = mixer.pack(metadata, reqs)
            parts.append(part)
            sizes.append((part_sizes, part.size))
        return (reqs, tuple(sizes)), np.concatenate(parts)

    def _run(self, sizes: _Sizes, token_ids: mx.array, packed: mx.array) -> mx.array:
        """Compute a step from its padded ids and the one array that says everything else."""
        reqs, part_sizes = sizes
        packed = on_device(packed)
        at, parts = max(MIN_ELEMENTS, reqs), {}
        for key, (own_sizes, elements) in zip(self._packers, part_sizes, strict=True):
            parts[key] = (own_sizes, packed[at : at + elements])
            at += elements
        return self._program(token_ids, self._mixers, StepRows(packed[:reqs], parts))

    def _after_states(self, token_ids: mx.array) -> mx.array:
        """Return the ids, to be read after states that other code wrote in place since the last step."""
        tokens = {id(token): token for cache in self._states if (token := cache.order_token) is not None}
        own = self._last
        others = [token.reshape(-1)[:1] for token in tokens.values() if token is not own]
        return token_ids + 0 * mx.concatenate(others).max() if others else token_ids

    def _keep_order(self, hidden: mx.array) -> None:
        """Let other code read the states after this step."""
        if not self._compiled or not self._states:
            return
        words = MIN_ELEMENTS * 4 // hidden.dtype.size
        self._last = hidden.reshape(-1)[:words].view(mx.int32)
        for cache in self._states:
            cache.follow(self._last)


def mixed_step(program: MixedProgram | None, names: Sequence[str], pool: KVCachePool) -> MixedStep | None:
    """Bind ``program`` to the model's layers ``names`` in ``pool``; None where kernels do not do all of it.

    Args:
        program: The model's layers.
        names: One for each layer that has caches; their names begin with it.
        pool: The pool.
    """
    if program is None or target() == "cpu" or len(names) != program.num_caches:
        return None
    mixers = program.caches(names)
    if not set(mixers) <= set(pool.layer_names):
        return None
    caches = {name: pool.layer(name) for name in mixers}
    if not all(mixer.served(caches[name]) for name, mixer in mixers.items()):
        return None
    return MixedStep(program, list(caches.values()), compiled=True)
