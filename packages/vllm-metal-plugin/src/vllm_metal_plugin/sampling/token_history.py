"""What each request has said so far, on the device because the host does not know the newest token yet."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

ABSENT = -1
"""Token id in a history that is shorter than its window."""


class _Slots:
    """Numbers handed out from the smallest free one."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 0

    def acquire(self) -> int:
        if self._free:
            self._free.sort(reverse=True)
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def release(self, slot: int) -> None:
        self._free.append(slot)


class TokenCounts:
    """How often each token was emitted, and whether it occurred at all, per request with a penalty.

    Invariants: a table row belongs to one request from ``acquire`` to ``release``; moving requests between
    batch rows does not touch the device.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots = _Slots()
        self._history = mx.zeros((0, vocab_size))

    @property
    def history(self) -> Float[mx.array, "slots vocab"]:
        """Times emitted, and a half more where a token occurs in the prompt, of all table rows."""
        return self._history

    def acquire(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> int:
        """Reserve a table row holding these tokens; ids outside the vocabulary are ignored."""
        slot = self._slots.acquire()
        if slot >= self._history.shape[0]:
            grown = mx.zeros((max(4, 2 * slot) - self._history.shape[0], self._vocab_size))
            self._history = mx.concatenate([self._history, grown])
        in_prompt = np.minimum(self._bincount(prompt_token_ids), 1.0)
        self._history[slot] = mx.array(self._bincount(output_token_ids) + in_prompt / 2)
        return slot

    def release(self, slot: int) -> None:
        """Give a table row back."""
        self._slots.release(slot)

    def append(self, slots: Int32[mx.array, "reqs"], token_ids: Int32[mx.array, "reqs"]) -> None:
        """Record one more emitted token for each of these table rows (lazily)."""
        self._history = self._history.at[slots, token_ids].add(mx.array(1.0))

    def rows(self, slots: Int32[mx.array, "reqs"]) -> Float[mx.array, "reqs vocab"]:
        """Return these table rows."""
        return self._history[slots]

    def arrays(self) -> list[mx.array]:
        """Return the device arrays, to be evaluated with the step."""
        return [self._history] if self._history.shape[0] else []

    def _bincount(self, token_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(token_ids, dtype=np.int64)
        ids = ids[(ids >= 0) & (ids < self._vocab_size)]
        return np.bincount(ids, minlength=self._vocab_size).astype(np.float32)


class RecentTokens:
    """The last few emitted tokens of each request that must not complete a forbidden sequence."""

    def __init__(self) -> None:
        self._slots = _Slots()
        self._window = mx.full((0, 1), ABSENT, dtype=mx.int32)

    @property
    def width(self) -> int:
        """Tokens remembered per request; ``ABSENT`` fills histories that are shorter, on the left."""
        return int(self._window.shape[1])

    def acquire(self, output_token_ids: Sequence[int], width: int) -> int:
        """Reserve a row that remembers at least ``width`` tokens."""
        slot = self._slots.acquire()
        rows, columns = self._window.shape
        if slot >= rows or width > columns:
            grown = np.full((max(rows, 2 * slot, 4), max(width, columns)), ABSENT, dtype=np.int32)
            window = mx.array(grown)
            if rows:
                window[:rows, grown.shape[1] - columns :] = self._window
            self._window = window
        last = np.full(self.width, ABSENT, dtype=np.int32)
        tail = list(output_token_ids)[-self.width :]
        if tail:
            last[-len(tail) :] = tail
        self._window[slot] = mx.array(last)
        return slot

    def release(self, slot: int) -> None:
        """Give a row back."""
        self._slots.release(slot)

    def append(self, slots: Int32[mx.array, "reqs"], token_ids: Int32[mx.array, "reqs"]) -> None:
        """Shift one more emitted token into each of these rows (lazily)."""
        shifted = mx.concatenate([self._window[slots][:, 1:], token_ids[:, None]], axis=1)
        self._window[slots] = shifted

    def rows(self, slots: Int32[mx.array, "reqs"]) -> Int32[mx.array, "reqs width"]:
        """Return the windows of these rows, newest token last."""
        return self._window[slots]

    def arrays(self) -> list[mx.array]:
        """Return the device array, to be evaluated with the step."""
        return [self._window] if self._window.shape[0] else []
