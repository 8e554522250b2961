"""What sampling has to know about every request of the batch, by batch row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from vllm_metal_plugin.sampling.structured_output import pack_bits
from vllm_metal_plugin.sampling.token_history import RecentTokens, TokenCounts
from vllm_metal_plugin.sampling.uniforms import BLOCK, NUMBERS, request_key, uniform_block

if TYPE_CHECKING:
    from vllm import SamplingParams

Float32Array = np.ndarray[Any, np.dtype[np.float32]]

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy sampling, as in vLLM."""


@dataclass(eq=False)
class RequestSampling:
    """One request's sampling rules, ready to use."""

    req_id: str
    params: "SamplingParams"
    key: int
    vocab_size: int
    top_k: int
    stop_token_ids: np.ndarray
    fixed_bias: tuple[np.ndarray, np.ndarray]
    """(token ids, addends) that never change: logit_bias, and -inf for bad words of one token."""
    bad_sequences: list[list[int]]
    """Bad words of several tokens."""
    allowed_bits: np.ndarray | None
    """int32 [words], or None when every token is allowed."""
    count_slot: int | None = None
    recent_slot: int | None = None
    block: int = -1
    uniforms: Float32Array = field(default_factory=lambda: np.zeros((BLOCK, NUMBERS), dtype=np.float32))

    def uniform(self, output_index: int) -> Float32Array:
        """Return the uniform numbers, float32 [NUMBERS], of the ``output_index``-th emitted token."""
        block, offset = divmod(output_index, BLOCK)
        if block != self.block:
            self.block, self.uniforms = block, uniform_block(self.key, block)
        numbers: Float32Array = self.uniforms[offset]
        return numbers

    def first_uniforms(self, output_index: int, count: int) -> Float32Array:
        """Return the first number of each of the next ``count`` tokens, at most ``BLOCK``."""
        self.uniform(output_index)
        numbers: Float32Array = self.uniforms[output_index % BLOCK :, 0]
        if len(numbers) < count:
            numbers = np.concatenate([numbers, uniform_block(self.key, self.block + 1)[:, 0]])
        return numbers[:count]


class SamplingState:
    """Sampling rules and histories of the batch.

    Rows are InputBatch rows. What depends on sampled tokens lives on the device and is advanced from lazy
    token ids; the number of emitted tokens, in-flight ones included, is known on the host.

    Invariants:
        - Only rows passed to the sampler advance (test_rows_that_do_not_emit_stay).
        - Adding a request again with the tokens it has emitted continues as if it had never left
          (test_resumed_request_continues).

    Args:
        max_num_reqs: Batch rows.
        vocab_size: Width of the logits.
        seed: The engine's seed, from which requests without their own get their keys in order of arrival;
            None draws those keys from the operating system.
    """

    def __init__(self, max_num_reqs: int, vocab_size: int, *, seed: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.num_output_tokens = np.zeros(max_num_reqs, dtype=np.int32)
        self.requests: list[RequestSampling | None] = [None] * max_num_reqs
        self.counts = TokenCounts(vocab_size)
        self.recent = RecentTokens()
        self.version = 0
        """Changes whenever a row holds another request than before."""
        self._entropy = None if seed is None else np.random.default_rng(seed)

    def grow(self, max_num_reqs: int) -> None:
        """Make room for more batch rows."""
        more = max_num_reqs - len(self.requests)
        self.requests.extend([None] * more)
        self.num_output_tokens = np.pad(self.num_output_tokens, (0, more))

    def add(
        self,
        row: int,
        req_id: str,
        sampling_params: "SamplingParams",
        prompt_token_ids: Sequence[int] | None,
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Put a request into a row, replacing what was there.

        Args:
            row: Batch row.
            req_id: vLLM's internal id.
            sampling_params: As received from vLLM.
            prompt_token_ids: None when the prompt was given as embeddings.
            output_token_ids: Tokens emitted so far, for a request that resumes.
        """
        if self.requests[row] is not None:
            self.remove(row)
        params = sampling_params
        request = self._compile(req_id, params)
        if has_penalties(params):
            request.count_slot = self.counts.acquire(prompt_token_ids or (), output_token_ids)
        if request.bad_sequences:
            width = max(len(sequence) for sequence in request.bad_sequences) - 1
            request.recent_slot = self.recent.acquire(output_token_ids, width)
        self.requests[row] = request
        self.num_output_tokens[row] = len(output_token_ids)
        self.version += 1

    def remove(self, row: int) -> None:
        """Empty a row; an empty row stays empty."""
        request = self.requests[row]
        if request is None:
            return
        if request.count_slot is not None:
            self.counts.release(request.count_slot)
        if request.recent_slot is not None:
            self.recent.release(request.recent_slot)
        self.requests[row] = None
        self.num_output_tokens[row] = 0
        self.version += 1

    def move(self, src: int, dst: int) -> None:
        """Move a request to another row, replacing what was there and leaving ``src`` empty."""
        if src == dst:
            return
        self.remove(dst)
        self.swap(src, dst)

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        self.requests[a], self.requests[b] = self.requests[b], self.requests[a]
        self.num_output_tokens[[a, b]] = self.num_output_tokens[[b, a]]
        self.version += 1

    def needs_logprobs(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows asked for log probabilities of its output."""
        return any(self.at(row).params.num_logprobs is not None for row in rows)

    def at(self, row: int) -> RequestSampling:
        """Return the request in a row, which must hold one."""
        request = self.requests[row]
        assert request is not None, f"batch row {row} is empty"
        return request

    def advance(self, rows: Sequence[int], token_ids: Int32[mx.array, "rows"]) -> None:
        """Record one emitted token per row, lazily where it is on the device."""
        self.num_output_tokens[list(rows)] += 1
        requests = [self.at(row) for row in rows]
        counted = [(i, r.count_slot) for i, r in enumerate(requests) if r.count_slot is not None]
        if counted:
            index, slots = np.array(counted, dtype=np.int32).T
            self.counts.append(mx.array(slots), _take(token_ids, index))
        watched = [(i, r.recent_slot) for i, r in enumerate(requests) if r.recent_slot is not None]
        if watched:
            index, slots = np.array(watched, dtype=np.int32).T
            self.recent.append(mx.array(slots), _take(token_ids, index))

    def arrays(self) -> list[mx.array]:
        """Return the device state, to be evaluated together with the step's tokens.

        Do not keep the list: an array that somebody else holds cannot be updated in place.
        """
        return self.counts.arrays() + self.recent.arrays()

    def _compile(self, req_id: str, params: "SamplingParams") -> RequestSampling:
        vocab_size = self.vocab_size
        bad_words = params.bad_words_token_ids or []
        single = [words[0] for words in bad_words if len(words) == 1]
        bias = params.logit_bias or {}
        tokens = np.array([*single, *bias.keys()], dtype=np.int32)
        addends = np.array([-np.inf] * len(single) + list(bias.values()), dtype=np.float32)
        inside = (tokens >= 0) & (tokens < vocab_size)
        stop = np.array(sorted(params.all_stop_token_ids), dtype=np.int32)
        allowed_bits = None
        if params.allowed_token_ids:
            allowed = np.zeros((1, vocab_size), dtype=bool)
            allowed[0, [token for token in params.allowed_token_ids if 0 <= token < vocab_size]] = True
            allowed_bits = pack_bits(allowed)[0]
        return RequestSampling(
            req_id=req_id,
            params=params,
            vocab_size=vocab_size,
            key=request_key(params.seed, self._entropy),
            top_k=params.top_k if 0 < params.top_k < vocab_size else vocab_size,
            stop_token_ids=stop[(stop >= 0) & (stop < vocab_size)],
            fixed_bias=(tokens[inside], addends[inside]),
            bad_sequences=[words for words in bad_words if len(words) > 1 and 0 <= words[-1] < vocab_size],
            allowed_bits=allowed_bits,
        )


def has_penalties(params: "SamplingParams") -> bool:
    """Whether the request's logits depend on which tokens occurred."""
    neutral = (1.0, 0.0, 0.0)
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != neutral


def _take(token_ids: Int32[mx.array, "rows"], index: np.ndarray) -> Int32[mx.array, "some"]:
    return token_ids if len(index) == token_ids.shape[0] else token_ids[mx.array(index)]
