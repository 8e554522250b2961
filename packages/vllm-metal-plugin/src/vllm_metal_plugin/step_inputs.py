"""From a scheduler's step and the batch to the arrays of one forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int32

from metal_kv import AttentionMetadata
from metal_models.multimodal import RowEmbeddings
from vllm_metal_plugin.input_batch import InputBatch


@dataclass(frozen=True, eq=False)
class StepInputs:
    """One step as data, its requests ordered with the one-row (decode) requests first.

    Attributes:
        rows: Batch row of each request of the step.
        emits: Which requests sample a token: those whose known tokens are all computed after this step.
        token_ids: Inputs on the device; those sampled by the previous step may not be computed yet.
        metadata: One for each cache group.
        embeddings: Rows that take an encoder's output in place of their token's embedding.
        rope_positions: Where every row is in time, height and width, in a step in which these differ.
        bidirectional: Ranges of rows that see each other, later ones too.
        drafts: Tokens of some requests that are guesses, the last ones of their rows; -1 stands for none.
    """

    req_ids: list[str]
    rows: Int32[np.ndarray, "reqs"]
    query_start_loc: Int32[np.ndarray, "reqs_plus_1"]
    seq_lens: Int32[np.ndarray, "reqs"]
    emits: Bool[np.ndarray, "reqs"]
    token_ids: Int32[mx.array, "tokens"]
    metadata: Sequence[AttentionMetadata]
    embeddings: RowEmbeddings | None = None
    rope_positions: Int32[mx.array, "3 tokens"] | None = None
    bidirectional: Sequence[tuple[int, int]] = ()
    drafts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def logits_indices(self) -> Int32[np.ndarray, "sampled"]:
        """The token rows after which each emitting request samples: its last one, and those before its drafts."""
        ends: np.ndarray = self.query_start_loc[1:]
        last: np.ndarray = ends[self.emits] - np.int32(1)
        if not self.drafts:
            return last
        num_drafts = [len(self.drafts.get(self.req_ids[i], ())) for i in np.flatnonzero(self.emits)]
        rows = [np.arange(end - count, end + 1, dtype=np.int32) for end, count in zip(last, num_drafts, strict=True)]
        return np.concatenate(rows)

    @property
    def emitting_rows(self) -> Int32[np.ndarray, "emitting"]:
        """Batch rows of the emitting requests."""
        rows: np.ndarray = self.rows[self.emits]
        return rows


def build_step_inputs(
    batch: InputBatch,
    num_scheduled_tokens: Mapping[str, int],
    block_sizes: Sequence[int | None],
    drafts: Mapping[str, Sequence[int]] | None = None,
) -> StepInputs:
    """Gather the inputs of one step; nothing waits for the device.

    Args:
        batch: Already updated with the scheduler's output.
        num_scheduled_tokens: New token rows of each request.
        block_sizes: Tokens per block of each cache group's table; None for a group of states, which has no slots.
        drafts: Of requests whose tokens the host knows: what their last rows are.
    """
    drafts = drafts or {}
    scheduled = list(num_scheduled_tokens)
    query_lens = np.fromiter(num_scheduled_tokens.values(), np.int32, len(scheduled))
    rows = np.fromiter((batch.row_of[req_id] for req_id in scheduled), np.int32, len(scheduled))
    # Rows that follow one another make the step's block tables views.
    order = np.lexsort((rows, query_lens != 1))
    req_ids = [scheduled[i] for i in order]
    query_lens, rows = query_lens[order], rows[order]
    query_start_loc = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(query_lens, out=query_start_loc[1:])
    seq_lens = batch.num_computed_tokens[rows] + query_lens
    metadata: list[AttentionMetadata] = []
    for table, block_size in zip(batch.block_tables, block_sizes, strict=True):
        of_group = AttentionMetadata.build(
            query_start_loc,
            seq_lens,
            table.rows(rows),
            block_size or 1,
            keeps_rows=block_size is not None,
            like=metadata[0] if metadata else None,
        )
        metadata.append(of_group)
    guesses = [drafts.get(req_id, ()) for req_id in req_ids]
    num_drafts = np.fromiter(map(len, guesses), np.int32, len(guesses))
    return StepInputs(
        req_ids=req_ids,
        rows=rows,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        emits=seq_lens - num_drafts >= batch.num_tokens[rows],
        token_ids=_token_ids(batch, rows, query_start_loc, seq_lens, guesses),
        metadata=metadata,
        drafts=drafts,
    )


def _token_ids(
    batch: InputBatch,
    rows: Int32[np.ndarray, "reqs"],
    query_start_loc: Int32[np.ndarray, "reqs_plus_1"],
    seq_lens: Int32[np.ndarray, "reqs"],
    drafts: Sequence[Sequence[int]],
) -> Int32[mx.array, "tokens"]:
    """Tokens that the host knows, drafts, and in the other places the last sampled token of the request's row."""
    host = np.zeros(query_start_loc[-1], np.int32)
    source = np.full(len(host), -1, np.int32)
    starts = batch.num_computed_tokens[rows]
    for i, row in enumerate(rows):
        known = batch.requests[row].token_ids[starts[i] : seq_lens[i]]
        if drafts[i]:
            known = np.append(known, np.maximum(drafts[i], 0))
        begin = query_start_loc[i]
        host[begin : begin + len(known)] = known
        source[begin + len(known) : query_start_loc[i + 1]] = row
    on_device = source >= 0
    if not on_device.any():
        return mx.array(host)
    sampled = batch.last_token_ids[mx.array(np.maximum(source, 0))]
    return sampled if on_device.all() else mx.where(mx.array(on_device), sampled, mx.array(host))
