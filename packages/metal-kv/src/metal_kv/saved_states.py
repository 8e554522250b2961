"""Recurrent states as they were before a step, to be put back where its tokens do not count."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from metal_kv.pool import KVCachePool


class SavedStates:
    """The states of some requests, beside the pool.

    Keys and values of guessed tokens that turn out wrong lie behind the last token that counts, where nobody reads
    them until they are written again. A state has no such place.

    Args:
        pool: Read now, and written by ``put_back``.
        blocks: For each cache group of recurrent layers, where the requests' states lie; every group names as many.
    """

    def __init__(self, pool: KVCachePool, blocks: Mapping[int, Sequence[int]]) -> None:
        self._layers = pool.state_layers()
        self._blocks = {group: np.asarray(block_ids, np.int32) for group, block_ids in blocks.items()}
        self._states = [layer.read_states(mx.array(self._blocks[layer.group])) for layer in self._layers]
        mx.eval(self._states)  # the step writes in place

    def put_back(self, places: Sequence[int]) -> None:
        """Make the states of some requests what they were, by their places in ``blocks``."""
        if not places:
            return
        rows = mx.array(np.asarray(places, np.int32))
        for layer, states in zip(self._layers, self._states, strict=True):
            layer.write_states([state[rows] for state in states], mx.array(self._blocks[layer.group][list(places)]))
