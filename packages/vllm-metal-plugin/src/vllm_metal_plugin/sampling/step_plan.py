"""The batch's sampling rules as arrays, built once and reused until the batch changes."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_metal_plugin.sampling.sampling_state import (
    GREEDY_BELOW,
    RequestSampling,
    SamplingState,
    has_penalties,
)
from vllm_metal_plugin.sampling.structured_output import additive_mask

NARROW = 128
"""Largest top_k for which a row is sampled from its best tokens alone."""


@dataclass(frozen=True, eq=False)
class SparseAdd:
    """Numbers to add to single logits."""

    rows: mx.array
    token_ids: mx.array
    addends: mx.array


@dataclass(frozen=True, eq=False)
class BadSequences:
    """Forbidden token sequences: the last token of each is forbidden where the rest has just been emitted."""

    rows: mx.array
    last_token_ids: mx.array
    slots: mx.array
    prefixes: mx.array
    """int32 [sequences, width], right-aligned like the histories."""
    unused: mx.array
    """bool [sequences, width]: columns left of the prefix."""


@dataclass(frozen=True, eq=False)
class Penalties:
    """Penalty parameters by logits row, and where the rows that have any keep their histories."""

    index: np.ndarray
    slots: mx.array
    by_row: mx.array
    """As ``metal_kernels.adjust_logits`` takes them."""
    repetition: mx.array | None
    one_sided: bool
    frequency: mx.array | None
    presence: mx.array | None


@dataclass(frozen=True, eq=False)
class RandomRows:
    """Parameters of rows that are not greedy, in the order of ``index``; None where no row uses one."""

    index: np.ndarray
    inverse_temperature: mx.array | None
    min_p_floor: mx.array | None
    top_k: mx.array | None
    largest_k: int
    top_p: mx.array | None


@dataclass(frozen=True, eq=False)
class LogprobRows:
    """Which logits rows report log probabilities: the best ``k``, or given tokens."""

    top_index: np.ndarray
    top_k: np.ndarray
    chosen_index: np.ndarray
    chosen_ids: mx.array
    num_chosen: np.ndarray

    @property
    def empty(self) -> bool:
        """Whether no row asked."""
        return not len(self.top_index) and not len(self.chosen_index)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Everything a sampler call needs besides the logits and what changes at every step."""

    requests: list[RequestSampling]
    narrow: RandomRows
    """Random rows whose top_k leaves few candidates."""
    wide: RandomRows
    """All other random rows."""
    greedy: np.ndarray
    """int32: the remaining rows."""
    allowed: tuple[np.ndarray, mx.array] | None
    fixed_bias: SparseAdd | None
    bad_sequences: BadSequences | None
    penalties: Penalties | None
    logprobs: LogprobRows
    min_tokens: np.ndarray
    """int32 [rows]; 0 for requests that no stop token could end."""

    @classmethod
    def build(cls, state: SamplingState, rows: Sequence[int]) -> "StepPlan":
        """Gather the rules of these batch rows, in this order."""
        requests = [state.at(row) for row in rows]
        greedy: list[int] = []
        narrow: list[int] = []
        wide: list[int] = []
        for i, request in enumerate(requests):
            if request.params.temperature < GREEDY_BELOW:
                greedy.append(i)
            else:
                (narrow if request.top_k <= min(NARROW, state.vocab_size - 1) else wide).append(i)
        return cls(
            requests=requests,
            narrow=_random_rows(requests, narrow),
            wide=_random_rows(requests, wide),
            greedy=np.array(greedy, dtype=np.int32),
            allowed=_allowed(requests, state.vocab_size),
            fixed_bias=sparse_add([(i, *request.fixed_bias) for i, request in enumerate(requests)]),
            bad_sequences=_bad_sequences(requests, state.recent.width),
            penalties=_penalties(requests),
            logprobs=_logprob_rows(requests, state.vocab_size),
            min_tokens=np.array(
                [r.params.min_tokens if len(r.stop_token_ids) else 0 for r in requests], dtype=np.int32
            ),
        )


def sparse_add(items: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> SparseAdd | None:
    """Join (row, token ids, addends) into one update; None when there is nothing to add."""
    items = [item for item in items if len(item[1])]
    if not items:
        return None
    return SparseAdd(
        mx.array(np.concatenate([np.full(len(tokens), row, dtype=np.int32) for row, tokens, _ in items])),
        mx.array(np.concatenate([tokens for _, tokens, _ in items])),
        mx.array(np.concatenate([addends for _, _, addends in items])),
    )


def _column(values: Sequence[float], neutral: float) -> mx.array | None:
    """Return float32 [rows, 1], or None when every value is the neutral one."""
    if all(value == neutral for value in values):
        return None
    return mx.array(np.array(values, dtype=np.float32)[:, None])


def _random_rows(requests: list[RequestSampling], index: list[int]) -> RandomRows:
    chosen = [requests[i] for i in index]
    params = [request.params for request in chosen]
    min_p = np.array([p.min_p for p in params], dtype=np.float32)
    floor = np.where(min_p > 0, np.nextafter(min_p, np.float32(0)), 0.0).astype(np.float32)
    top_k = np.array([request.top_k for request in chosen], dtype=np.int32)
    limited = [request.top_k for request in chosen if request.top_k < request.vocab_size]
    return RandomRows(
        index=np.array(index, dtype=np.int32),
        inverse_temperature=_column([1.0 / p.temperature for p in params], 1.0),
        min_p_floor=mx.array(floor[:, None]) if floor.any() else None,
        top_k=mx.array(top_k[:, None]) if limited else None,
        largest_k=max(limited, default=0),
        top_p=_column([p.top_p for p in params], 1.0),
    )


def _allowed(requests: list[RequestSampling], vocab_size: int) -> tuple[np.ndarray, mx.array] | None:
    index = [i for i, r in enumerate(requests) if r.allowed_bits is not None]
    if not index:
        return None
    bits = np.stack([bits for r in requests if (bits := r.allowed_bits) is not None])
    return np.array(index, dtype=np.int32), additive_mask(bits, vocab_size)


def _bad_sequences(requests: list[RequestSampling], width: int) -> BadSequences | None:
    found = [(i, r.recent_slot, words) for i, r in enumerate(requests) for words in r.bad_sequences]
    if not found:
        return None
    prefixes = np.zeros((len(found), width), dtype=np.int32)
    unused = np.ones((len(found), width), dtype=bool)
    for n, (_, _, words) in enumerate(found):
        prefixes[n, width - len(words) + 1 :] = words[:-1]
        unused[n, width - len(words) + 1 :] = False
    return BadSequences(
        rows=mx.array(np.array([i for i, _, _ in found], dtype=np.int32)),
        last_token_ids=mx.array(np.array([words[-1] for _, _, words in found], dtype=np.int32)),
        slots=mx.array(np.array([slot for _, slot, _ in found], dtype=np.int32)),
        prefixes=mx.array(prefixes),
        unused=mx.array(unused),
    )


def _penalties(requests: list[RequestSampling]) -> Penalties | None:
    index = [i for i, r in enumerate(requests) if has_penalties(r.params)]
    if not index:
        return None
    params = [requests[i].params for i in index]
    by_row = np.zeros((len(requests), 8), dtype=np.float32)
    by_row[:, 0] = -1
    for i, p in zip(index, params, strict=True):
        penalties = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
        by_row[i, :4] = (requests[i].count_slot, *penalties)
    return Penalties(
        index=np.array(index, dtype=np.int32),
        by_row=mx.array(by_row),
        slots=mx.array(np.array([requests[i].count_slot for i in index], dtype=np.int32)),
        repetition=_column([p.repetition_penalty for p in params], 1.0),
        one_sided=all(p.repetition_penalty >= 1.0 for p in params),
        frequency=_column([p.frequency_penalty for p in params], 0.0),
        presence=_column([p.presence_penalty for p in params], 0.0),
    )


def _logprob_rows(requests: list[RequestSampling], vocab_size: int) -> LogprobRows:
    chosen = [(i, r.params.logprob_token_ids) for i, r in enumerate(requests) if r.params.logprob_token_ids]
    top = [
        (i, vocab_size if r.params.logprobs == -1 else min(r.params.logprobs, vocab_size))
        for i, r in enumerate(requests)
        if r.params.logprobs is not None and not r.params.logprob_token_ids
    ]
    num_chosen = np.array([len(ids) for _, ids in chosen], dtype=np.int32)
    ids = np.zeros((len(chosen), int(num_chosen.max(initial=0))), dtype=np.int32)
    for n, (_, token_ids) in enumerate(chosen):
        ids[n, : len(token_ids)] = token_ids
    return LogprobRows(
        top_index=np.array([i for i, _ in top], dtype=np.int32),
        top_k=np.array([k for _, k in top], dtype=np.int32),
        chosen_index=np.array([i for i, _ in chosen], dtype=np.int32),
        chosen_ids=mx.array(ids),
        num_chosen=num_chosen,
    )
