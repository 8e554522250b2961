"""Cached rows of prompts, found again by their longest common prefix: a radix tree of bounded size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, TypeVar

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

State = TypeVar("State")
_TOKEN_AXIS = -2


@dataclass(eq=False)
class _Node(Generic[State]):
    """An edge of the tree and the place where it ends."""

    tokens: np.ndarray
    rows: tuple[mx.array, ...]
    parent: "_Node[State] | None"
    children: dict[int, "_Node[State]"] = field(default_factory=dict)
    state: State | None = None
    state_nbytes: int = 0
    used: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.tokens.nbytes) + sum(array.nbytes for array in self.rows) + self.state_nbytes


@dataclass(frozen=True)
class Match(Generic[State]):
    """What the tree has of a prompt.

    Attributes:
        length: Tokens whose rows are here.
        rows: For each of a prompt's arrays its pieces in order; concatenated over the tokens they are ``length`` long.
        state: What was kept at ``length``, if states are needed.
        known: Tokens that are in the tree, whether or not a state makes them usable.
    """

    length: int
    rows: tuple[tuple[mx.array, ...], ...]
    state: State | None
    known: int


class PrefixTree(Generic[State]):
    """Keys and values of prompts, shared where prompts are, and states where they were taken.

    Arrays with a row for each token are cut along their last axis but one, so that any prefix can be used. States
    (of windows that rotate, of recurrences) cannot be cut: with them a prefix is usable where one was taken. What was
    used longest ago goes first, the end of a prompt before its beginning.

    Nothing that is handed out is written to: who goes on from it makes arrays of his own.

    Invariants (``tests/test_prefix_tree.py``): a match holds the rows of the tokens it was asked for, under the salt
    it was asked for; the bytes of all nodes add up to ``nbytes``, which is at most ``max_bytes``.

    Args:
        max_bytes: Most bytes to hold.
        needs_state: Whether a prefix is of use only with a state.
    """

    def __init__(self, max_bytes: int, *, needs_state: bool = False) -> None:
        self.max_bytes = max_bytes
        self.needs_state = needs_state
        self.nbytes = 0
        self._roots: dict[str, _Node[State]] = {}
        self._clock = 0
        self._moved: list[mx.array] = []

    @property
    def arrays(self) -> list[mx.array]:
        """Everything held that has rows, to be evaluated."""
        return [array for node in self._nodes() for array in node.rows]

    def match(self, token_ids: Int32[np.ndarray, "tokens"], *, salt: str = "") -> Match[State]:
        """Return the longest usable prefix.

        Args:
            token_ids: Tokens to look for.
            salt: Prompts share rows only under the same salt: a tenant, an adapter, an image.
        """
        path, known = self._walk(salt, token_ids)
        self._touch([node for node, _ in path])
        usable, length, state = path, known, None
        if self.needs_state:
            usable, length = [], 0
            depth = 0
            for index, (node, taken) in enumerate(path):
                depth += taken
                if taken == len(node.tokens) and node.state is not None:
                    usable, length, state = path[: index + 1], depth, node.state
        pieces = [tuple(_cut(array, 0, taken) for array in node.rows) for node, taken in usable]
        return Match(length, tuple(zip(*pieces, strict=True)), state, known)

    def insert(
        self,
        token_ids: Int32[np.ndarray, "tokens"],
        rows: Callable[[int, int], Sequence[mx.array]],
        states: Mapping[int, tuple[State, int]] | None = None,
        *,
        salt: str = "",
    ) -> list[mx.array]:
        """Keep a prompt; the part that is known already is not kept twice.

        Args:
            token_ids: The prompt.
            rows: Returns, for positions ``begin`` to ``end``, the rows of each array, in memory of their own.
            states: States and their bytes by the number of tokens they were taken after.
            salt: See ``match``.

        Returns:
            Arrays that were added or cut in two, to be evaluated.
        """
        states = dict(states or {})
        path, known = self._walk(salt, token_ids)
        cuts = [*sorted({known, *(p for p in states if known < p < len(token_ids))}), len(token_ids)]
        node = self._end_of(salt, path)
        added: list[mx.array] = []
        for begin, end in pairwise(cuts):
            if begin == end:
                continue
            leaf: _Node[State] = _Node(np.array(token_ids[begin:end]), tuple(rows(begin, end)), node)
            node.children[int(leaf.tokens[0])] = leaf
            self.nbytes += leaf.nbytes
            added += leaf.rows
            node = leaf
        for position, (state, nbytes) in states.items():
            self._set_state(salt, token_ids[:position], state, nbytes)
        self._touch([node for node, _ in self._walk(salt, token_ids)[0]])
        self._evict()
        added += self._moved
        self._moved = []
        return added

    def _walk(self, salt: str, token_ids: np.ndarray) -> tuple[list[tuple[_Node[State], int]], int]:
        """Return the nodes along ``token_ids``, how many tokens of each are shared, and how many in all."""
        path: list[tuple[_Node[State], int]] = []
        node, depth = self._roots.get(salt), 0
        while node is not None and depth < len(token_ids):
            node = node.children.get(int(token_ids[depth]))
            if node is None:
                break
            ahead = token_ids[depth : depth + len(node.tokens)]
            differs = np.flatnonzero(ahead != node.tokens[: len(ahead)])
            taken = int(differs[0]) if differs.size else len(ahead)
            path.append((node, taken))
            depth += taken
            if taken < len(node.tokens):
                break
        return path, depth

    def _end_of(self, salt: str, path: list[tuple[_Node[State], int]]) -> _Node[State]:
        """Return the node that ends where the path does, cutting an edge in two if need be."""
        if not path:
            return self._roots.setdefault(salt, _Node(np.zeros(0, np.int32), (), None))
        node, taken = path[-1]
        return node if taken == len(node.tokens) else self._split(node, taken)

    def _split(self, node: _Node[State], length: int) -> _Node[State]:
        """Put a node of ``length`` tokens above the rest of ``node``; return it."""
        parent = node.parent
        upper: _Node[State] = _Node(
            node.tokens[:length].copy(), tuple(_own(array, 0, length) for array in node.rows), parent, used=node.used
        )
        before = node.nbytes
        end = len(node.tokens)
        node.rows = tuple(_own(array, length, end) for array in node.rows)
        node.tokens = node.tokens[length:].copy()
        node.parent = upper
        upper.children[int(node.tokens[0])] = node
        if parent is not None:
            parent.children[int(upper.tokens[0])] = upper
        self.nbytes += upper.nbytes + node.nbytes - before
        self._moved += [*upper.rows, *node.rows]
        return upper

    def _set_state(self, salt: str, token_ids: np.ndarray, state: State, nbytes: int) -> None:
        path, known = self._walk(salt, token_ids)
        if known < len(token_ids) or not path:
            return
        node = self._end_of(salt, path)
        self.nbytes += nbytes - node.state_nbytes
        node.state, node.state_nbytes = state, nbytes

    def _touch(self, nodes: Sequence[_Node[State]]) -> None:
        """Note a use; a beginning counts as used after its continuation."""
        for node in reversed(nodes):
            self._clock += 1
            node.used = self._clock

    def _nodes(self) -> Iterator[_Node[State]]:
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            if node.parent is not None:
                yield node

    def _evict(self) -> None:
        while self.nbytes > self.max_bytes:
            oldest = min(
                (node for node in self._nodes() if not node.children or node.state is not None),
                key=lambda node: node.used,
            )
            if oldest.children:
                self.nbytes -= oldest.state_nbytes
                oldest.state, oldest.state_nbytes = None, 0
            else:
                self.nbytes -= oldest.nbytes
                if oldest.parent is not None:
                    del oldest.parent.children[int(oldest.tokens[0])]


def _cut(array: mx.array, begin: int, end: int) -> mx.array:
    return array if (begin, end) == (0, array.shape[_TOKEN_AXIS]) else array[..., begin:end, :]


def _own(array: mx.array, begin: int, end: int) -> mx.array:
    """Rows in memory of their own: a slice would keep the whole array."""
    return mx.contiguous(array[..., begin:end, :])
