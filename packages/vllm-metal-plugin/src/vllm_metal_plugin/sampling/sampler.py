"""One token per logits row, by vLLM's rules in vLLM's order."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from vllm_metal_plugin.sampling.kernel_rows import KernelRows
from vllm_metal_plugin.sampling.logprobs import (
    LogprobColumns,
    SampleLogprobs,
    chosen_logprobs,
    top_logprobs,
)
from vllm_metal_plugin.sampling.penalties import (
    apply_frequency_penalty,
    apply_presence_penalty,
    apply_repetition_penalty,
)
from vllm_metal_plugin.sampling.random_rows import Drawn, draw_narrow, draw_wide
from vllm_metal_plugin.sampling.sampling_state import SamplingState
from vllm_metal_plugin.sampling.step_plan import LogprobRows, Penalties, StepPlan, sparse_add
from vllm_metal_plugin.sampling.structured_output import GrammarRows, add_rows, apply_grammar

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsLists

Table = Float[mx.array, "rows vocab"]


class SampledTokens(ABC):
    """What a step sampled, request by request."""

    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """Return what has to be evaluated before the values are read."""

    @abstractmethod
    def token_lists(self) -> list[list[int]]:
        """Return the tokens of each request."""

    @abstractmethod
    def logprob_lists(self, output_index: Sequence[int], num_reqs: int) -> "LogprobsLists | None":
        """Return log probabilities in vLLM's form, if any request asked; see ``join_logprobs``."""


@dataclass(frozen=True, eq=False)
class SamplerOutput(SampledTokens):
    """Tokens of one step, on the device and not evaluated yet."""

    token_ids: Int32[mx.array, "rows"]
    logprobs: SampleLogprobs | None

    def arrays(self) -> list[mx.array]:
        """Return what has to be evaluated before the values are read."""
        return [self.token_ids, *(self.logprobs.arrays() if self.logprobs else [])]

    def token_lists(self) -> list[list[int]]:
        """Return the one token of each row."""
        return [[token] for token in np.array(self.token_ids).tolist()]

    def logprob_lists(self, output_index: Sequence[int], num_reqs: int) -> "LogprobsLists | None":
        """Return log probabilities in vLLM's form; see ``join_logprobs``."""
        return None if self.logprobs is None else self.logprobs.to_lists(output_index, num_reqs)


class Sampler:
    """Samples the rows of a step, lazily.

    The order is vLLM's: grammar bitmask; raw log probabilities; allowed_token_ids; bad_words; min_tokens;
    logit_bias; repetition, frequency and presence penalties; greedy choice; temperature; min_p; top_k; top_p;
    draw. A step pays only for what its rows ask for; an all-greedy one is a single argmax.

    A seeded request draws the same tokens from the same logits whatever else is in the batch.

    Args:
        vocab_size: Width of the logits.
        logprobs_mode: ``raw_logprobs``, ``raw_logits``, ``processed_logprobs`` or ``processed_logits``.
    """

    def __init__(self, vocab_size: int, logprobs_mode: str = "raw_logprobs") -> None:
        self._vocab_size = vocab_size
        self._raw = logprobs_mode.startswith("raw")
        self._normalise = logprobs_mode.endswith("logprobs")
        self._plan_key: tuple[int, int, tuple[int, ...]] | None = None
        self._plan: StepPlan | None = None
        self._kernels = KernelRows()

    def __call__(
        self, logits: Table, rows: Sequence[int], state: SamplingState, grammar: GrammarRows | None = None
    ) -> SamplerOutput:
        """Sample one token per logits row and advance the state of those requests (lazily).

        Args:
            logits: The head's output for the rows that emit a token, in any float type.
            rows: The batch row of each logits row; every batch row at most once.
            state: Holds a request at each of those batch rows.
            grammar: Which tokens grammars allow.
        """
        plan = self._plan_for(state, rows)
        if grammar is not None and not self._fused(logits, plan, state, rows):
            logits, grammar = self._apply_grammar(logits, grammar, state), None
        scores = self._adjust(logits, plan, state, rows, grammar)
        token_ids, processed = self._sample(scores, plan, state, rows)
        self._kernels.note_tokens(token_ids)
        logprobs = None
        if not plan.logprobs.empty:
            reported = logits if self._raw else processed
            logprobs = _report(reported, token_ids, plan.logprobs, normalise=self._normalise)
        state.advance(rows, token_ids)
        return SamplerOutput(token_ids, logprobs)

    def _fused(self, logits: Table, plan: StepPlan, state: SamplingState, rows: Sequence[int]) -> bool:
        """Whether one kernel does what the grammar and penalties ask for: nothing comes between them."""
        between = (plan.allowed, plan.bad_sequences, plan.fixed_bias)
        return (
            plan.penalties is not None
            and plan.logprobs.empty
            and all(rule is None for rule in between)
            and bool((state.num_output_tokens[list(rows)] >= plan.min_tokens).all())
            and self._kernels.serve(logits)
        )

    def _apply_grammar(self, logits: Table, grammar: GrammarRows, state: SamplingState) -> Table:
        if self._kernels.serve(logits):
            return self._kernels.adjust(logits, grammar, None, state)
        return apply_grammar(logits, grammar)

    def _adjust(
        self,
        logits: Table,
        plan: StepPlan,
        state: SamplingState,
        rows: Sequence[int],
        grammar: GrammarRows | None,
    ) -> Table:
        """Apply everything that can change a greedy choice; returns ``logits`` itself when there is nothing."""
        logits = _forbid_and_bias(logits, plan, state, rows)
        if plan.penalties is None:
            return logits
        if self._kernels.serve(logits):
            return self._kernels.adjust(logits, grammar, plan.penalties, state)
        return _penalise(logits.astype(mx.float32), plan.penalties, state)

    def _plan_for(self, state: SamplingState, rows: Sequence[int]) -> StepPlan:
        key = (id(state), state.version, tuple(rows))
        if self._plan is None or self._plan_key != key:
            self._plan_key, self._plan = key, StepPlan.build(state, rows)
        return self._plan

    def _sample(
        self, scores: Table, plan: StepPlan, state: SamplingState, rows: Sequence[int]
    ) -> tuple[Int32[mx.array, "rows"], Table]:
        """Return the tokens, and the logits as they were drawn from, to be reported if asked for."""
        if len(plan.greedy) == scores.shape[0]:
            return mx.argmax(scores, axis=1).astype(mx.int32), scores
        counts = state.num_output_tokens[list(rows)]
        if self._kernels.serve(scores) and (self._raw or plan.logprobs.empty):
            return self._kernels.sample(scores, plan, counts), scores
        emitted = counts.tolist()
        parts: list[Drawn] = []
        if len(plan.greedy):
            some = take_rows(scores, plan.greedy)
            parts.append(Drawn(mx.argmax(some, axis=1).astype(mx.int32), some.astype(mx.float32)))
        for group, sample in ((plan.narrow, draw_narrow), (plan.wide, draw_wide)):
            if len(group.index):
                uniform = mx.array(np.stack([plan.requests[i].uniform(emitted[i]) for i in group.index]))
                some = take_rows(scores, group.index).astype(mx.float32)
                parts.append(sample(some, uniform, group, exact_logits=not self._raw and not plan.logprobs.empty))
        if len(parts) == 1:
            return parts[0]
        index = np.concatenate([plan.greedy, plan.narrow.index, plan.wide.index])
        order = mx.array(np.argsort(index).astype(np.int32))
        token_ids = mx.concatenate([part.token_ids for part in parts])[order]
        return token_ids, mx.concatenate([part.logits for part in parts])[order]


def take_rows(values: mx.array, index: np.ndarray) -> mx.array:
    """Return some rows; all of them cost nothing. ``index`` is increasing."""
    return values if len(index) == values.shape[0] else values[mx.array(index)]


def _forbid_and_bias(logits: Table, plan: StepPlan, state: SamplingState, rows: Sequence[int]) -> Table:
    if plan.allowed is not None:
        logits = add_rows(logits, *plan.allowed)
    if (bad := plan.bad_sequences) is not None:
        recent = state.recent.rows(bad.slots)
        complete = mx.all((recent == bad.prefixes) | bad.unused, axis=1)
        addends = mx.where(complete, -float("inf"), 0.0)
        logits = logits.astype(mx.float32).at[bad.rows, bad.last_token_ids].add(addends)
    logits = _forbid_stop_tokens(logits, plan, state.num_output_tokens[list(rows)])
    if (bias := plan.fixed_bias) is not None:
        logits = logits.astype(mx.float32).at[bias.rows, bias.token_ids].add(bias.addends)
    return logits


def _forbid_stop_tokens(logits: Table, plan: StepPlan, emitted: np.ndarray) -> Table:
    """Forbid EOS and stop tokens where ``min_tokens`` is not reached.

    A grammar that has come to its end allows nothing else; such a row keeps them.
    """
    short = np.flatnonzero(emitted < plan.min_tokens)
    stops = [(int(i), plan.requests[i].stop_token_ids) for i in short]
    update = sparse_add([(i, ids, np.full(len(ids), -np.inf, dtype=np.float32)) for i, ids in stops])
    if update is None:
        return logits
    logits = logits.astype(mx.float32)
    masked = logits.at[update.rows, update.token_ids].add(update.addends)
    structured = [plan.requests[i].params.structured_outputs is not None for i in range(len(emitted))]
    if any(structured[i] for i, _ in stops):
        dead = mx.max(masked, axis=1, keepdims=True) == -float("inf")
        masked = mx.where(dead & mx.array(structured)[:, None], logits, masked)
    return masked


def _penalise(logits: Table, penalties: Penalties, state: SamplingState) -> Table:
    history = state.counts.rows(penalties.slots)
    some = take_rows(logits, penalties.index)
    if penalties.repetition is not None:
        some = apply_repetition_penalty(some, history, penalties.repetition, one_sided=penalties.one_sided)
    if penalties.frequency is not None:
        some = apply_frequency_penalty(some, history, penalties.frequency)
    if penalties.presence is not None:
        some = apply_presence_penalty(some, history, penalties.presence)
    if len(penalties.index) == logits.shape[0]:
        return some
    logits = logits[:]
    logits[mx.array(penalties.index)] = some
    return logits


def _report(
    scores: Table, token_ids: Int32[mx.array, "rows"], wanted: LogprobRows, *, normalise: bool
) -> SampleLogprobs:
    parts: list[LogprobColumns] = []
    scores = scores.astype(mx.float32)
    if len(wanted.top_index):
        some, tokens = take_rows(scores, wanted.top_index), take_rows(token_ids, wanted.top_index)
        parts.append(top_logprobs(some, tokens, int(wanted.top_k.max()), normalise=normalise))
    if len(wanted.chosen_index):
        some, tokens = take_rows(scores, wanted.chosen_index), take_rows(token_ids, wanted.chosen_index)
        ids = mx.concatenate([tokens[:, None], wanted.chosen_ids], axis=1)
        parts.append(chosen_logprobs(some, ids, normalise=normalise))
    width = max(part.logprobs.shape[1] for part in parts)
    columns = LogprobColumns(
        mx.concatenate([_widen(part.token_ids, width) for part in parts]),
        mx.concatenate([_widen(part.logprobs, width) for part in parts]),
        mx.concatenate([part.ranks for part in parts]),
    )
    return SampleLogprobs(
        np.concatenate([wanted.top_index, wanted.chosen_index]),
        columns,
        np.concatenate([wanted.top_k, wanted.num_chosen]) + 1,
    )


def _widen(values: mx.array, width: int) -> mx.array:
    return mx.pad(values, [(0, 0), (0, width - values.shape[1])])
