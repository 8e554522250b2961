"""A scheduler's step as MLX work: state update, inputs, forward, sampling, output."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, DraftTokenIds, ModelRunnerOutput

from vllm_metal_plugin.async_output import AsyncStepOutput
from vllm_metal_plugin.forward_pass import ForwardPass
from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.log import metal_logger
from vllm_metal_plugin.prompt_logprobs import PromptScores, score_prompts
from vllm_metal_plugin.sampling import GrammarRows, SampledTokens, Sampler
from vllm_metal_plugin.step_inputs import StepInputs, build_step_inputs
from vllm_metal_plugin.upstream_fixes.failed_steps import FailedStepOutput

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

logger = metal_logger(__name__)


@dataclass(frozen=True, eq=False)
class PendingStep:
    """A forward pass on its way, waiting to be sampled."""

    inputs: StepInputs
    logits: mx.array | None
    prompts: PromptScores
    failed: frozenset[str]


class ModelRunner:
    """Turns each ``SchedulerOutput`` into one ragged forward pass and one lazy output.

    Nothing here waits for the device before the next step is dispatched, with one exception: on a CPU the cache is
    updated in place only when the step before has finished (``wait_before_dispatch``).
    """

    def __init__(
        self,
        forward_pass: ForwardPass,
        batch: InputBatch,
        sampler: Sampler,
        *,
        block_sizes: Sequence[int | None],
        wait_before_dispatch: bool,
        debug: bool = False,
    ) -> None:
        """Take the parts; ``block_sizes`` are those of ``build_step_inputs``, ``debug`` logs every step."""
        self._forward_pass = forward_pass
        self._batch = batch
        self._sampler = sampler
        self._block_sizes = tuple(block_sizes)
        self._wait_before_dispatch = wait_before_dispatch
        self._debug = debug
        self._pending: PendingStep | FailedStepOutput | None = None
        self._in_flight: list[mx.array] = []

    def execute_model(self, scheduler_output: "SchedulerOutput") -> ModelRunnerOutput | None:
        """Build and dispatch the forward pass; ``sample_tokens`` returns its output.

        A step without tokens only updates the state and returns the empty output.
        """
        self._batch.update(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            self._forward_pass.begin(scheduler_output)
            return EMPTY_MODEL_RUNNER_OUTPUT
        try:
            self._pending = self._forward(scheduler_output)
        except Exception:
            req_ids = list(scheduler_output.num_scheduled_tokens)
            logger.exception("A step failed; its %d requests end with an error", len(req_ids))
            self._pending = FailedStepOutput.for_requests(req_ids)
            self._in_flight = []
        return None

    def sample_tokens(self, grammar_output: "GrammarOutput | None") -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Sample the pending step lazily."""
        pending, self._pending = self._pending, None
        if pending is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        if isinstance(pending, FailedStepOutput):
            return pending
        try:
            return self._sample(pending, grammar_output)
        except Exception:
            logger.exception("Sampling failed; %d requests end with an error", len(pending.inputs.req_ids))
            return FailedStepOutput.for_requests(pending.inputs.req_ids)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Nothing is drafted."""
        return None

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """Which of vLLM's tasks this does."""
        return ("generate",)

    def synchronize(self) -> None:
        """Wait until the device has finished everything dispatched so far."""
        mx.eval(self._in_flight, self._forward_pass.arrays())

    def _forward(self, scheduler_output: "SchedulerOutput") -> PendingStep:
        start = time.perf_counter()
        self._forward_pass.begin(scheduler_output)
        inputs = self._build_inputs(scheduler_output)
        hidden = self._forward_pass.forward(inputs, self._batch)
        logits = None
        if inputs.emits.any():
            logits = self._forward_pass.compute_logits(hidden[mx.array(inputs.logits_indices)])
        prompts = score_prompts(self._batch, inputs, hidden, self._forward_pass.compute_logits)
        self._dispatch([hidden if logits is None else logits], [*self._forward_pass.arrays(), *prompts.pieces])
        if self._debug:
            logger.info(
                "Step of %d rows, %d requests, %d emit; longest context %d; %.2f ms to dispatch",
                inputs.query_start_loc[-1],
                len(inputs.rows),
                inputs.emits.sum(),
                inputs.seq_lens.max(),
                1e3 * (time.perf_counter() - start),
            )
        return PendingStep(inputs, logits, prompts, self._forward_pass.failed_requests())

    def _build_inputs(self, scheduler_output: "SchedulerOutput") -> StepInputs:
        return build_step_inputs(self._batch, scheduler_output.num_scheduled_tokens, self._block_sizes)

    def _dispatch(self, results: list[mx.array], cache: list[mx.array]) -> None:
        """Start computing; the graph is complete, so the wait on a CPU overlaps all the host's work."""
        if self._wait_before_dispatch:
            mx.eval(self._in_flight)
        mx.async_eval(results, cache)  # type: ignore[no-untyped-call]
        self._in_flight = results

    def _sample(self, step: PendingStep, grammar_output: "GrammarOutput | None") -> AsyncModelRunnerOutput:
        inputs = step.inputs
        sampled = None
        if step.logits is not None:
            rows = inputs.emitting_rows
            grammar = None
            if grammar_output is not None:
                emitting = [inputs.req_ids[i] for i in np.flatnonzero(inputs.emits)]
                grammar = GrammarRows.from_vllm(grammar_output, {req_id: row for row, req_id in enumerate(emitting)})
            sampled = self._sampler(step.logits, rows.tolist(), self._batch.sampling, grammar)
            self._batch.record_sampled(rows, sampled.token_ids)
        return self._output(step, sampled)

    def _output(self, step: PendingStep, sampled: SampledTokens | None) -> AsyncModelRunnerOutput:
        """Start computing what a step's output and the next step's sampling need."""
        inputs = step.inputs
        output = AsyncStepOutput(inputs.req_ids, inputs.emits, sampled, step.prompts.completed, step.failed)
        state = [*self._batch.sampling.arrays(), self._batch.last_token_ids]
        mx.async_eval(output.arrays(), state)  # type: ignore[no-untyped-call]
        return output
