"""Steps of one row per request: a compiled graph for each bucket of sizes."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.layer_cache import LayerCache
from metal_kv.spec import RecurrentStateSpec
from metal_models.step_memory import BUCKETS, MIN_ELEMENTS, StepMemory, bucket, on_device
from metal_models.step_rows import Packer, StepRows

logger = logging.getLogger(__name__)

_READS_VALUES = "during function transformations"  # what MLX says of an evaluation while it traces


class NotCompiledError(Exception):
    """A step cannot be compiled; the text says why in one clause."""


_Sizes = tuple[int, tuple[tuple[Any, int], ...]]
"""Padded requests; for each packer its sizes and how many numbers it packed."""


class CompiledStep:
    """What computes a step, bound to the layers of a pool.

    Args:
        rows: Takes ids, one for each row, and what the layers share; returns hidden rows, and has the layers' rows
            and states written before these can be read.
        packers: What the layers need of a step's metadata.
        caches: The pool's layers.
        compiled: Whether steps are compiled and kernels write in place; else they run on any device, through the
            kernels' twins.
    """

    def __init__(
        self,
        rows: Callable[[mx.array, StepRows], mx.array],
        packers: Iterable[Packer],
        caches: Sequence[LayerCache],
        *,
        compiled: bool,
    ) -> None:
        self._rows = rows
        self._packers = list(dict.fromkeys(packers))
        self._states = [cache for cache in caches if isinstance(cache.spec, RecurrentStateSpec)]
        self._compiled = compiled
        self._memory = StepMemory()
        self._graphs: dict[_Sizes, Callable[[mx.array, mx.array], mx.array]] = {}
        self._refused: set[_Sizes] = set()
        self._last: mx.array | None = None

    def serves(self, metadata: Sequence[AttentionMetadata]) -> bool:
        """Whether every request of the step has one row, and there are not too many."""
        batch = metadata[0].batch
        return 0 < batch.num_reqs <= BUCKETS[-1] and batch.num_decodes == batch.num_reqs

    def __call__(
        self, token_ids: Int32[mx.array, "tokens"], metadata: Sequence[AttentionMetadata]
    ) -> Float[mx.array, "tokens hidden"] | None:
        """Write the step's rows and states and return its hidden rows, lazily.

        Args:
            token_ids: One id for each request.
            metadata: One per cache group.

        Returns:
            The rows; None, with nothing done, where steps of such sizes cannot be compiled, which the log says once.
        """
        rows = metadata[0].batch.num_reqs
        sizes, packed = self._packed(metadata)
        if sizes in self._refused:
            return None
        graph = self._graphs.get(sizes)
        if graph is None:
            graph = partial(self._run, sizes)
            graph = self._graphs[sizes] = mx.compile(graph) if self._compiled else graph
        token_ids = self._after_states(token_ids)
        if rows < sizes[0]:
            token_ids = mx.pad(token_ids, (0, sizes[0] - rows))
        slot = self._memory.filled(packed)
        try:
            slot.reader = hidden = graph(token_ids, slot.array)
        except NotCompiledError as error:
            self._refuse(sizes, str(error))
            return None
        except (RuntimeError, ValueError) as error:
            if _READS_VALUES not in str(error):
                raise
            self._refuse(sizes, "a module reads values on the host")
            return None
        self._keep_order(hidden)
        return hidden[:rows] if rows < sizes[0] else hidden

    def _refuse(self, sizes: _Sizes, why: str) -> None:
        if not self._refused:
            logger.info("Decode steps run on the model's modules without being compiled: %s.", why)
        self._refused.add(sizes)

    def _packed(self, metadata: Sequence[AttentionMetadata]) -> tuple[_Sizes, Int32[np.ndarray, "elements"]]:
        """Return positions, then what the packers pack, as one array: it travels to the device at once."""
        num_reqs = metadata[0].batch.num_reqs
        reqs = bucket(num_reqs)
        positions = np.zeros(max(MIN_ELEMENTS, reqs), np.int32)
        positions[:num_reqs] = metadata[0].places.host
        parts, sizes = [positions], []
        for packer in self._packers:
            part_sizes, part = packer.pack(metadata, reqs)
            parts.append(part)
            sizes.append((part_sizes, part.size))
        return (reqs, tuple(sizes)), np.concatenate(parts)

    def _run(self, sizes: _Sizes, token_ids: mx.array, packed: mx.array) -> mx.array:
        """Compute a step from its padded ids and the one array that says everything else."""
        reqs, part_sizes = sizes
        packed = on_device(packed)
        at, parts = max(MIN_ELEMENTS, reqs), {}
        for packer, (own_sizes, elements) in zip(self._packers, part_sizes, strict=True):
            parts[packer] = (own_sizes, packed[at : at + elements])
            at += elements
        return self._rows(token_ids, StepRows(packed[:reqs], parts))

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
