"""Which drafts are kept: those that sampling would have chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from vllm_metal_plugin.sampling import (
    GrammarRows,
    SampledTokens,
    SampleLogprobs,
    Sampler,
    SamplingState,
    join_logprobs,
)

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsLists


@dataclass(frozen=True, eq=False)
class Verified(SampledTokens):
    """Tokens of one step, as :class:`~vllm_metal_plugin.sampling.SamplerOutput` has them, but known already.

    Attributes:
        tokens: Of each request the drafts that are kept, and one more.
        columns: For each place after the last token the requests that came so far, and their log probabilities.
    """

    tokens: list[list[int]]
    columns: Sequence[tuple[Int32[np.ndarray, "_alive"], SampleLogprobs | None]]

    def arrays(self) -> list[mx.array]:
        """Return what has to be evaluated before log probabilities are read."""
        return [array for _, logprobs in self.columns if logprobs is not None for array in logprobs.arrays()]

    def token_lists(self) -> list[list[int]]:
        """Return the tokens of each request."""
        return self.tokens

    def logprob_lists(self, output_index: Sequence[int], num_reqs: int) -> "LogprobsLists | None":
        """Return log probabilities in vLLM's form; see :func:`~vllm_metal_plugin.sampling.join_logprobs`."""
        places = np.asarray(output_index)
        parts = [(logprobs, places[alive].tolist()) for alive, logprobs in self.columns if logprobs is not None]
        return join_logprobs(parts, num_reqs) if parts else None


def first_rows(drafts: Sequence[Sequence[int]]) -> Int32[np.ndarray, "reqs"]:
    """Return each request's first row of logits, where it has one and one more for each of its drafts."""
    firsts: np.ndarray = np.cumsum([0, *(1 + len(tokens) for tokens in drafts)])[:-1].astype(np.int32)
    return firsts


def verify(
    logits: Float[mx.array, "tokens vocab"],
    rows: Int32[np.ndarray, "reqs"],
    drafts: Sequence[Sequence[int]],
    sampler: Sampler,
    state: SamplingState,
    grammar: GrammarRows | None = None,
) -> Verified:
    """Sample after each request's last token, and after each draft as long as it is what was sampled before it.

    Each place waits for the one before: what is penalised or forbidden there depends on it.

    Args:
        logits: Of each request one row, and one for each of its drafts.
        rows: Batch rows of the requests.
        drafts: Of each request; those that are not to be kept are -1.
        sampler: As without drafts.
        state: Advances by the tokens that are returned.
        grammar: By rows of ``logits``.
    """
    firsts = first_rows(drafts)
    tokens: list[list[int]] = [[] for _ in drafts]
    columns = []
    alive = np.arange(len(rows), dtype=np.int32)
    for column in range(1 + max(map(len, drafts), default=0)):
        if len(alive) == 0:
            break
        index = firsts[alive] + column
        some = logits if len(index) == logits.shape[0] else logits[mx.array(index)]
        sampled = sampler(some, rows[alive].tolist(), state, _of_rows(grammar, index))
        columns.append((alive, sampled.logprobs))
        kept = []
        for request, token in zip(alive.tolist(), np.array(sampled.token_ids).tolist(), strict=True):
            tokens[request].append(token)
            if column < len(drafts[request]) and drafts[request][column] == token:
                kept.append(request)
        alive = np.array(kept, np.int32)
    return Verified(tokens, columns)


def _of_rows(grammar: GrammarRows | None, index: Int32[np.ndarray, "alive"]) -> GrammarRows | None:
    """Return what a grammar says of some rows of the logits, numbered anew."""
    if grammar is None:
        return None
    place = {row: at for at, row in enumerate(index.tolist())}
    chosen = [i for i, row in enumerate(grammar.rows.tolist()) if row in place]
    if not chosen:
        return None
    rows = np.array([place[row] for row in grammar.rows[chosen].tolist()], np.int32)
    return replace(grammar, rows=rows, bitmask=grammar.bitmask[chosen])
