"""The forward pass of a model that takes prompts whole and keeps nothing of them."""

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from metal_models import EncoderModel
from vllm_metal_plugin.forward_pass import ForwardPass
from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.step_inputs import StepInputs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

FIRST_OF_SECOND_TEXT = "compressed_token_type_ids"
"""vLLM's name, among a request's extra parameters, for the position from which tokens are of the second segment."""


class EncoderForward(ForwardPass):
    """An encoder."""

    def __init__(self, model: EncoderModel) -> None:
        self._model = model

    def begin(self, scheduler_output: "SchedulerOutput") -> None:
        """There is no cache."""

    def forward(self, inputs: StepInputs, batch: InputBatch) -> Float[mx.array, "tokens hidden"]:
        """Compute the step's prompts."""
        return self._model.forward(inputs.token_ids, inputs.query_start_loc, _segments(inputs, batch))

    def arrays(self) -> list[mx.array]:
        """There is no cache."""
        return []


def _segments(inputs: StepInputs, batch: InputBatch) -> mx.array | None:
    """Return the segment of each token of the step, or None where all are of the first."""
    given = [batch.requests[row].pooling_params for row in inputs.rows]
    firsts = [((params and params.extra_kwargs) or {}).get(FIRST_OF_SECOND_TEXT) for params in given]
    if all(first is None for first in firsts):
        return None
    segments = np.zeros(inputs.query_start_loc[-1], np.int32)
    for first, start, end in zip(firsts, inputs.query_start_loc[:-1], inputs.query_start_loc[1:], strict=True):
        if first is not None:
            segments[start + first : end] = 1
    return mx.array(segments)
