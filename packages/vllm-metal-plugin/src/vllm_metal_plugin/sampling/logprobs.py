"""Log probabilities for clients: top-k, chosen tokens and ranks, in the shapes that vLLM expects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from vllm_metal_plugin.sampling.draw import log_sum_exp
from vllm_metal_plugin.sampling.top_values import top_tokens

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors


@dataclass(frozen=True, eq=False)
class LogprobColumns:
    """Scores of some tokens for each of some rows, lazy; column 0 is the token that was taken."""

    token_ids: Int32[mx.array, "rows columns"]
    logprobs: Float[mx.array, "rows columns"]
    ranks: Int32[mx.array, "rows"]
    """1-based: how many tokens score at least as much as the one in column 0."""

    def arrays(self) -> list[mx.array]:
        """Return what has to be evaluated before the values are read."""
        return [self.token_ids, self.logprobs, self.ranks]


def top_logprobs(
    scores: Float[mx.array, "rows vocab"],
    token_ids: Int32[mx.array, "rows"],
    k: int,
    *,
    normalise: bool,
) -> LogprobColumns:
    """Return the taken token followed by the ``k`` best, best first (lazy).

    Args:
        scores: Logits, raw or processed.
        token_ids: The token taken in each row.
        k: How many best tokens; 0 gives column 0 alone.
        normalise: Whether to return log probabilities; else the scores themselves.
    """
    columns = token_ids[:, None]
    if k > 0:
        columns = mx.concatenate([columns, top_tokens(scores, k)], axis=1)
    return chosen_logprobs(scores, columns, normalise=normalise)


def chosen_logprobs(
    scores: Float[mx.array, "rows vocab"], columns: Int32[mx.array, "rows columns"], *, normalise: bool
) -> LogprobColumns:
    """Return the scores of the given tokens, the rank being that of column 0 (lazy)."""
    scores = scores.astype(mx.float32)
    taken = mx.take_along_axis(scores, columns, axis=1)
    ranks = mx.sum(scores >= taken[:, :1], axis=1).astype(mx.int32)
    if normalise:
        taken = taken - log_sum_exp(scores)
    return LogprobColumns(columns.astype(mx.int32), taken, ranks)


@dataclass(frozen=True, eq=False)
class SampleLogprobs:
    """Log probabilities of one sampler call, lazy, for the rows whose requests asked for them."""

    rows: np.ndarray
    """int [n]: the logits row of each row of ``columns``."""
    columns: LogprobColumns
    num_columns: np.ndarray
    """int [n]: how many columns of that row are asked for; the rest is padding."""

    def arrays(self) -> list[mx.array]:
        """Return what has to be evaluated before ``on_host``."""
        return self.columns.arrays()

    def on_host(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return token ids and log probabilities, ``width`` columns each, -inf where none is asked for, and ranks."""
        columns = self.columns
        wider = ((0, 0), (0, width - columns.logprobs.shape[1]))
        logprobs = np.pad(np.array(columns.logprobs), wider)
        logprobs[np.arange(width) >= self.num_columns[:, None]] = -np.inf
        return np.pad(np.array(columns.token_ids), wider), logprobs, np.array(columns.ranks)

    def to_lists(self, output_index: Sequence[int], num_reqs: int) -> "LogprobsLists":
        """Build vLLM's form of this call alone (evaluates); see ``join_logprobs``."""
        return join_logprobs([(self, output_index)], num_reqs)


def join_logprobs(parts: Sequence[tuple[SampleLogprobs, Sequence[int]]], num_reqs: int) -> "LogprobsLists":
    """Build vLLM's form of several calls (evaluates).

    Args:
        parts: Of each call, at least one and those of later tokens later, what it reports and the place of each of
            its logits rows in ``ModelRunnerOutput.req_ids``.
        num_reqs: Length of ``ModelRunnerOutput.req_ids``.
    """
    from vllm.v1.outputs import LogprobsLists

    place = np.concatenate([np.asarray(index, dtype=np.int64)[logprobs.rows] for logprobs, index in parts])
    order = np.argsort(place, kind="stable")
    width = max(logprobs.columns.logprobs.shape[1] for logprobs, _ in parts)
    token_ids, values, ranks = (
        np.concatenate(arrays)[order]
        for arrays in zip(*(logprobs.on_host(width) for logprobs, _ in parts), strict=True)
    )
    starts = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=num_reqs))])
    return LogprobsLists(token_ids, values, ranks, starts.tolist())


class PromptLogprobs:
    """Log probabilities of one request's prompt, collected chunk by chunk.

    Args:
        num_prompt_tokens: Length of the prompt; its first token has no log probability.
        k: Best tokens per position; -1 stands for the whole vocabulary.
        vocab_size: Width of the logits.
        logprobs_mode: vLLM's; prompt positions are not processed, so raw and processed are the same.
    """

    def __init__(self, num_prompt_tokens: int, k: int, vocab_size: int, logprobs_mode: str) -> None:
        self._num_positions = num_prompt_tokens - 1
        self._k = vocab_size if k == -1 else min(k, vocab_size)
        self._normalise = logprobs_mode.endswith("logprobs")
        self._chunks: list[tuple[int, LogprobColumns]] = []

    def add(self, start: int, logits: Float[mx.array, "rows vocab"], target_token_ids: Sequence[int]) -> None:
        """Record rows ``start`` onwards (lazily).

        Args:
            start: Position in the prompt of the first row.
            logits: The head's output at those positions.
            target_token_ids: The prompt token that follows each position.
        """
        targets = mx.array(np.asarray(target_token_ids, dtype=np.int32))
        self._chunks.append((start, top_logprobs(logits, targets, self._k, normalise=self._normalise)))

    def arrays(self) -> list[mx.array]:
        """Return what has to be evaluated before ``to_tensors``."""
        return [array for _, columns in self._chunks for array in columns.arrays()]

    def to_tensors(self) -> "LogprobsTensors":
        """Build vLLM's form, on torch's CPU (evaluates). A position recorded twice keeps the later record."""
        import torch
        from vllm.v1.outputs import LogprobsTensors

        tensors = LogprobsTensors.empty_cpu(self._num_positions, self._k + 1)
        for start, columns in self._chunks:
            rows = slice(start, start + columns.ranks.shape[0])
            tensors.logprob_token_ids[rows] = torch.from_numpy(np.array(columns.token_ids))
            tensors.logprobs[rows] = torch.from_numpy(np.array(columns.logprobs))
            tensors.selected_token_ranks[rows] = torch.from_numpy(np.array(columns.ranks))
        return tensors
