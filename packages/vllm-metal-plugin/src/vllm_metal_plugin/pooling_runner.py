"""A scheduler's step of prompts to be pooled: state update, inputs, forward, vLLM's pooler."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import torch
from vllm.model_executor.layers.pooler import Pooler
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.pool.late_interaction_runner import LateInteractionRunner
from vllm.v1.pool.metadata import PoolingMetadata

from metal_models.torch_bridge import to_torch
from vllm_metal_plugin.forward_pass import ForwardPass
from vllm_metal_plugin.input_batch import InputBatch, RequestState
from vllm_metal_plugin.log import metal_logger
from vllm_metal_plugin.step_inputs import StepInputs, build_step_inputs
from vllm_metal_plugin.upstream_fixes.failed_steps import FailedStepOutput

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

logger = metal_logger(__name__)


class PoolingRunner:
    """Turns each ``SchedulerOutput`` into one ragged forward pass and the pooled rows of the prompts it completes.

    Args:
        forward_pass: The model and its cache.
        batch: The requests.
        pooler: Takes hidden rows in torch, on the CPU.
        block_sizes: Those of ``build_step_inputs``.
    """

    def __init__(
        self, forward_pass: ForwardPass, batch: InputBatch, pooler: Pooler, *, block_sizes: Sequence[int | None]
    ) -> None:
        self._forward_pass = forward_pass
        self._batch = batch
        self._pooler = pooler
        self._block_sizes = tuple(block_sizes)
        self._late_interaction = LateInteractionRunner(enable_flash=False)

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """Which of vLLM's tasks the pooler does."""
        return tuple(sorted(self._pooler.get_supported_tasks()))

    def execute_model(self, scheduler_output: "SchedulerOutput") -> ModelRunnerOutput:
        """Compute the step and return its output."""
        self._batch.update(scheduler_output)
        self._late_interaction.on_requests_finished(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            self._late_interaction.register_request(new.req_id, new.pooling_params)
        try:
            self._forward_pass.begin(scheduler_output)
            if scheduler_output.total_num_scheduled_tokens == 0:
                return EMPTY_MODEL_RUNNER_OUTPUT
            return self._pool(build_step_inputs(self._batch, scheduler_output.num_scheduled_tokens, self._block_sizes))
        except Exception:
            req_ids = list(scheduler_output.num_scheduled_tokens)
            logger.exception("A step failed; its %d requests end with an error", len(req_ids))
            return FailedStepOutput.for_requests(req_ids)

    def sample_tokens(self, grammar_output: "GrammarOutput | None") -> ModelRunnerOutput:
        """Nothing is sampled."""
        return EMPTY_MODEL_RUNNER_OUTPUT

    def synchronize(self) -> None:
        """Every step is waited for."""

    def _pool(self, inputs: StepInputs) -> ModelRunnerOutput:
        hidden = self._forward_pass.forward(inputs, self._batch)
        mx.eval(hidden, self._forward_pass.arrays())
        metadata = self._metadata(inputs)
        finished = metadata.get_pooling_cursor().get_finished_mask()
        pooled = self._late_interaction.postprocess_pooler_output(
            raw_pooler_output=list(self._pooler(to_torch(hidden), metadata)),
            pooling_params=metadata.pooling_params,
            req_ids=inputs.req_ids,
            finished_mask=finished,
        )
        return ModelRunnerOutput(
            req_ids=inputs.req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(inputs.req_ids)},
            pooler_output=[rows if done else None for rows, done in zip(pooled, finished, strict=True)],
        )

    def _metadata(self, inputs: StepInputs) -> PoolingMetadata:
        """Describe the step's requests, in its order, as vLLM's poolers want it."""
        requests = [self._batch.requests[row] for row in inputs.rows]
        params: list[Any] = [request.pooling_params for request in requests]
        for asked in params:
            self._pooler.get_pooling_updates(asked.task).apply(asked)
        metadata = PoolingMetadata(
            prompt_lens=torch.tensor([request.num_prompt_tokens for request in requests]),
            prompt_token_ids=None,
            prompt_token_ids_cpu=_prompts(requests) if any(asked.requires_token_ids for asked in params) else None,
            pooling_params=params,
            pooling_states=[request.pooling_states for request in requests],
        )
        metadata.build_pooling_cursor(
            np.diff(inputs.query_start_loc).astype(np.int64),
            torch.from_numpy(inputs.seq_lens.astype(np.int64)),
            device=torch.device("cpu"),
        )
        return metadata


def _prompts(requests: list[RequestState]) -> torch.Tensor:
    """Return the prompts' tokens, padded on the right."""
    prompts = [torch.from_numpy(request.token_ids.astype(np.int64)) for request in requests]
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
