"""Log probabilities of prompt tokens, from the hidden rows of the step that computes them."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float

from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.sampling import PromptLogprobs
from vllm_metal_plugin.step_inputs import StepInputs

ROWS_AT_ONCE = 256
"""The head's output for a whole prompt can be larger than the model; this many rows of it exist at a time."""


@dataclass(frozen=True)
class PromptScores:
    """What one step adds.

    Attributes:
        completed: Collectors of requests that emit their first token in this step.
        pieces: Lazy arrays of all collectors touched, to be evaluated with the step.
    """

    completed: dict[str, PromptLogprobs]
    pieces: list[mx.array]


def score_prompts(
    batch: InputBatch,
    inputs: StepInputs,
    hidden: Float[mx.array, "tokens hidden"],
    compute_logits: Callable[[mx.array], mx.array],
) -> PromptScores:
    """Score each scheduled prompt token that a request asked about, given the tokens before it.

    A request's collector leaves the batch with the step that completes it, so it is delivered once.
    """
    scores = PromptScores({}, [])
    for i, row in enumerate(inputs.rows):
        request = batch.requests[row]
        collector = request.prompt_logprobs
        if collector is None:
            continue
        first = int(inputs.query_start_loc[i])
        start = int(inputs.seq_lens[i]) - (int(inputs.query_start_loc[i + 1]) - first)
        end = min(int(inputs.seq_lens[i]), request.num_prompt_tokens - 1)
        for begin in range(start, end, ROWS_AT_ONCE):
            stop = min(begin + ROWS_AT_ONCE, end)
            logits = compute_logits(hidden[first + begin - start : first + stop - start])
            collector.add(begin, logits, request.token_ids[begin + 1 : stop + 1].tolist())
        scores.pieces.extend(collector.arrays())
        if inputs.emits[i]:
            scores.completed[request.req_id] = collector
            request.prompt_logprobs = None
    return scores
