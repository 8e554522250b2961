"""A step's output that is still being computed when the engine gets it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from jaxtyping import Bool
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, LogprobsTensors, ModelRunnerOutput

from vllm_metal_plugin.log import metal_logger
from vllm_metal_plugin.sampling import PromptLogprobs, SampledTokens
from vllm_metal_plugin.upstream_fixes.failed_steps import FailedStepOutput

logger = metal_logger(__name__)


@dataclass
class AsyncStepOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """Lazy tokens and logprobs of one step; read once, perhaps on another thread.

    Attributes:
        req_ids: All requests of the step.
        emits: Which of them sampled; the others get an empty list.
        sampled: The sampler's output for the emitting requests, None when there are none.
        prompts: Prompt logprobs of requests whose prompt this step completed.
        failed: Requests that end with an error instead.
    """

    req_ids: list[str]
    emits: Bool[np.ndarray, "reqs"]
    sampled: SampledTokens | None
    prompts: Mapping[str, PromptLogprobs] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()

    def arrays(self) -> list[mx.array]:
        """What has to be evaluated before ``get_output`` can answer without waiting."""
        sampled: Sequence[mx.array] = self.sampled.arrays() if self.sampled is not None else ()
        return [*sampled, *(array for prompt in self.prompts.values() for array in prompt.arrays())]

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the step and return it in vLLM's types.

        A step that fails while the device computes it fails its requests, not the engine.
        """
        try:
            return self._read()
        except Exception:
            logger.exception("A step failed; its %d requests end with an error", len(self.req_ids))
            return FailedStepOutput.for_requests(self.req_ids)

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """There are no connectors."""
        return None

    def _read(self) -> ModelRunnerOutput:
        token_ids: list[list[int]] = [[] for _ in self.req_ids]
        logprobs = None
        if self.sampled is not None:
            emitting = np.flatnonzero(self.emits)
            for i, tokens in zip(emitting, self.sampled.token_lists(), strict=True):
                token_ids[i] = tokens
            logprobs = self.sampled.logprob_lists(emitting.tolist(), len(self.req_ids))
        prompts: dict[str, LogprobsTensors | None] = {
            req_id: prompt.to_tensors() for req_id, prompt in self.prompts.items()
        }
        output = ModelRunnerOutput(
            req_ids=self.req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(self.req_ids)},
            sampled_token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs_dict=prompts,
        )
        return FailedStepOutput.of_some(output, self.failed) if self.failed else output
