"""Sampling in two kernels, where the device has them."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels import adjust_logits, pack_sampling_rules, sample_rows, serves_sampling
from metal_models.step_memory import Slot, StepMemory
from vllm_metal_plugin.sampling.sampling_state import GREEDY_BELOW, RequestSampling, SamplingState
from vllm_metal_plugin.sampling.step_plan import Penalties, StepPlan
from vllm_metal_plugin.sampling.structured_output import GrammarRows

AHEAD = 32
"""Tokens of each request whose uniform numbers go to the device at once."""

_MIN_ELEMENTS = 8

Table = Float[mx.array, "rows vocab"]


class KernelRows:
    """What the kernels read of a batch, kept on the device while the batch stays as it is."""

    def __init__(self) -> None:
        self._memory = StepMemory()
        self._bits: Slot | None = None
        self._plan: StepPlan | None = None
        self._rules = mx.zeros((0, 8))
        self._start = np.zeros(0, np.int32)
        self._uniforms: list[mx.array] = []

    @staticmethod
    def serve(logits: Table) -> bool:
        """Whether kernels take such logits; else MLX's operations do what they do."""
        return serves_sampling(logits.dtype, logits.shape[1])

    def adjust(
        self, logits: Table, grammar: GrammarRows | None, penalties: Penalties | None, state: SamplingState
    ) -> Float[mx.array, "rows vocab"]:
        """Return float32 logits after penalties, and with every token that the grammar forbids at -inf."""
        rows, vocab = logits.shape
        history = None if penalties is None else state.counts.history
        packed = None if penalties is None else penalties.by_row
        if grammar is None:
            return adjust_logits(logits, history=history, penalties=packed)
        words = max(-(-vocab // 32), grammar.bitmask.shape[1])
        bits = grammar.bitmask
        if bits.shape != (rows, words) or not np.array_equal(grammar.rows, np.arange(rows)):
            bits = np.full((rows, words), -1, np.int32)
            bits[grammar.rows] = 0
            bits[grammar.rows, : grammar.bitmask.shape[1]] = grammar.bitmask
        self._bits = self._memory.filled(bits.ravel())
        bitmask = self._bits.array.reshape(rows, words)
        return adjust_logits(logits, history=history, penalties=packed, bitmask=bitmask)

    def note_tokens(self, token_ids: Int32[mx.array, "rows"]) -> None:
        """Keep a grammar's bits as they are until the tokens that follow from them are known."""
        if self._bits is not None:
            self._bits.reader, self._bits = token_ids, None

    def sample(self, scores: Table, plan: StepPlan, emitted: Int32[np.ndarray, "rows"]) -> Int32[mx.array, "rows"]:
        """Return a token for each row, greedy ones included."""
        if plan is not self._plan:
            self._plan, self._uniforms = plan, []
            params = [request.params for request in plan.requests]
            self._rules = mx.array(
                pack_sampling_rules(
                    np.array([p.temperature if p.temperature >= GREEDY_BELOW else 0 for p in params], np.float32),
                    np.array([p.min_p for p in params], np.float32),
                    np.array([request.top_k for request in plan.requests], np.int32),
                    np.array([p.top_p for p in params], np.float32),
                )
            )
        return sample_rows(scores, self._uniform(plan.requests, emitted), self._rules)

    def _uniform(
        self, requests: list[RequestSampling], emitted: Int32[np.ndarray, "rows"]
    ) -> Float[mx.array, "one numbers"]:
        """Return the rows' numbers for the tokens after ``emitted``."""
        steps = emitted - self._start if len(emitted) == len(self._start) else np.array([-1])
        step = int(steps[0])
        if not 0 <= step < len(self._uniforms) or (steps != step).any():
            table = np.zeros((AHEAD, max(_MIN_ELEMENTS, len(requests))), np.float32)
            for row, (request, index) in enumerate(zip(requests, emitted.tolist(), strict=True)):
                if request.params.temperature >= GREEDY_BELOW:
                    table[:, row] = request.first_uniforms(index, AHEAD)
            self._uniforms = list(mx.split(mx.array(table), AHEAD))
            self._start, step = emitted.copy(), 0
        return self._uniforms[step]
