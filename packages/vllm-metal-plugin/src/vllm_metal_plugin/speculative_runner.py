"""Steps that check drafts: several rows and several tokens of a request at a time."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, DraftTokenIds

from metal_kv import KVCachePool, SavedStates
from vllm_metal_plugin.model_runner import ModelRunner, PendingStep
from vllm_metal_plugin.sampling import GrammarRows
from vllm_metal_plugin.spec_decode.proposer import Proposer
from vllm_metal_plugin.spec_decode.verify import Verified, first_rows, verify
from vllm_metal_plugin.step_inputs import StepInputs, build_step_inputs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


MAX_SAVED_STATES = 8
"""Requests whose recurrent states may be saved at a time: with more there are no drafts, which then gain little."""


class SpeculativeRunner(ModelRunner):
    """A runner whose steps may hold drafts; it reads each step's tokens, since the next drafts follow from them.

    Recurrent states are saved before a step with drafts. Where some were wrong, they are put back, and the next step
    of the request starts with the tokens that were kept and has no drafts.
    """

    def __init__(
        self, *args: Any, proposer: Proposer, max_drafts: int, max_model_len: int, pool: KVCachePool, **options: Any
    ) -> None:
        """Take what a ``ModelRunner`` takes, who makes drafts, how many and up to which length, and the cache."""
        super().__init__(*args, **options)
        self._proposer = proposer
        self._max_drafts = max_drafts
        self._max_model_len = max_model_len
        self._pool = pool
        self._state_groups = {layer.group for layer in pool.state_layers()}
        self._saved: tuple[list[str], SavedStates] | None = None
        self._state_lens: dict[str, int] = {}
        self._drafts = DraftTokenIds([], [])

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Return what the scheduler is to try in the next step, once."""
        drafts, self._drafts = self._drafts, DraftTokenIds([], [])
        return drafts

    def _build_inputs(self, scheduler_output: "SchedulerOutput") -> StepInputs:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        num_rows = self._with_kept_tokens(scheduler_output)
        self._save_states(list(drafts))
        return build_step_inputs(self._batch, num_rows, self._block_sizes, drafts)

    def _with_kept_tokens(self, scheduler_output: "SchedulerOutput") -> Mapping[str, int]:
        """Return the rows of each request, with those first that its states have not seen."""
        self._state_lens = {req_id: n for req_id, n in self._state_lens.items() if req_id in self._batch.row_of}
        num_rows = dict(scheduler_output.num_scheduled_tokens)
        for req_id in num_rows:
            row = self._batch.row_of[req_id]
            computed = int(self._batch.num_computed_tokens[row])
            begin = min(self._state_lens.pop(req_id, computed), computed)
            num_rows[req_id] += computed - begin
            self._batch.num_computed_tokens[row] = begin
        return num_rows

    def _save_states(self, req_ids: Sequence[str]) -> None:
        self._saved = None
        if not req_ids or not self._state_groups:
            return
        rows = [self._batch.row_of[req_id] for req_id in req_ids]
        # Without prefix caching a request has one state, in its first block.
        blocks = {
            group: [int(self._batch.block_tables[group].row(row)[0]) for row in rows] for group in self._state_groups
        }
        self._saved = (list(req_ids), SavedStates(self._pool, blocks))

    def _sample(self, step: PendingStep, grammar_output: "GrammarOutput | None") -> AsyncModelRunnerOutput:
        inputs = step.inputs
        verified = None
        if step.logits is not None:
            emitting = [inputs.req_ids[i] for i in np.flatnonzero(inputs.emits)]
            drafts = [list(inputs.drafts.get(req_id, ())) for req_id in emitting]
            grammar = None
            if grammar_output is not None:
                grammar = _grammar(grammar_output, emitting, drafts, inputs.drafts)
            rows = inputs.emitting_rows
            verified = verify(step.logits, rows, drafts, self._sampler, self._batch.sampling, grammar)
            for row, tokens in zip(rows.tolist(), verified.tokens, strict=True):
                self._batch.append_tokens(row, tokens)
            self._put_states_back(inputs, emitting, verified)
            self._propose(emitting)
        return self._output(step, verified)

    def _put_states_back(self, inputs: StepInputs, emitting: Sequence[str], verified: Verified) -> None:
        if self._saved is None:
            return
        saved_ids, saved = self._saved
        self._saved = None
        num_tokens = dict(zip(emitting, map(len, verified.tokens), strict=True))
        wrong = [req_id for req_id in saved_ids if num_tokens[req_id] <= len(inputs.drafts[req_id])]
        saved.put_back([saved_ids.index(req_id) for req_id in wrong])
        for req_id in wrong:
            self._state_lens[req_id] = int(self._batch.num_computed_tokens[self._batch.row_of[req_id]])

    def _propose(self, req_ids: Sequence[str]) -> None:
        if self._state_groups and self._batch.num_reqs > MAX_SAVED_STATES:
            return
        drafts = []
        for req_id in req_ids:
            token_ids = self._batch.requests[self._batch.row_of[req_id]].token_ids
            room = 0 if req_id in self._state_lens else self._max_model_len - len(token_ids)
            drafts.append(self._proposer.propose(token_ids, min(self._max_drafts, room)))
        self._drafts = DraftTokenIds(list(req_ids), drafts)


def _grammar(
    grammar_output: "GrammarOutput",
    emitting: Sequence[str],
    drafts: list[list[int]],
    scheduled: Mapping[str, Sequence[int]],
) -> GrammarRows | None:
    """Line a grammar up with the logits; drafts that it did not see are made -1 in ``drafts``."""
    acceptable = grammar_output.num_acceptable_drafts
    place = {req_id: at for at, req_id in enumerate(emitting)}
    for i, req_id in enumerate(grammar_output.structured_output_request_ids):
        if req_id in place:
            tokens = drafts[place[req_id]]
            seen = acceptable[i] if acceptable is not None else 0
            tokens[seen:] = [-1] * len(tokens[seen:])
    return GrammarRows.from_vllm(
        grammar_output,
        dict(zip(emitting, first_rows(drafts).tolist(), strict=True)),
        {req_id: len(tokens) for req_id, tokens in scheduled.items()},
    )
