"""The only per-request state: one dense row for each request that the engine is running."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from jaxtyping import Int32
from vllm.sampling_params import SamplingParams
from vllm.v1.pool.metadata import PoolingStates

from metal_kv import BlockTable
from vllm_metal_plugin.sampling import PromptLogprobs, SamplingState

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.pooling_params import PoolingParams
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput


@dataclass
class RequestState:
    """What stays the same while a request lives, and what only its prefill needs.

    ``token_ids`` are the tokens that the host knows: the prompt, and after a preemption or with drafts the outputs so
    far.
    ``prompt_logprobs`` collects what the request asked about its prompt until that has been delivered.
    A request to be pooled has ``pooling_params``, and sampling parameters that nobody reads.
    """

    req_id: str
    sampling_params: SamplingParams
    token_ids: Int32[np.ndarray, "tokens"]
    num_prompt_tokens: int
    prompt_logprobs: PromptLogprobs | None = None
    pooling_params: "PoolingParams | None" = None
    pooling_states: PoolingStates = field(default_factory=PoolingStates)
    lora_request: "LoRARequest | None" = None


class InputBatch:
    """Requests in rows ``0 .. num_reqs - 1``; the last row moves into the place of one that leaves.

    Invariants (test_input_batch.py):
        * every array and table has the same request in the same row (test_rows_stay_dense);
        * a preempted request has no row until it resumes (test_preempted_request_resumes);
        * ``last_token_ids[row]`` is the newest sampled token, on the device, perhaps not yet computed.

    Attributes:
        num_tokens: Tokens of each request including sampled ones whose value is still on the device.
        num_computed_tokens: Tokens whose keys and values are in the cache when the next step starts.
    """

    def __init__(
        self,
        *,
        max_reqs: int,
        max_blocks: Sequence[int],
        kernel_blocks_per_block: Sequence[int] | None = None,
        sampling: SamplingState,
        new_prompt_logprobs: Callable[[int, int], PromptLogprobs],
    ) -> None:
        """Make an empty batch.

        Args:
            max_reqs: Rows to start with; more are made when more requests are known at a time.
            max_blocks: Blocks of the longest request in each cache group.
            kernel_blocks_per_block: Of each cache group, where kernels want smaller blocks than the scheduler.
            sampling: Kept in the same rows as everything here.
            new_prompt_logprobs: Makes a collector from the prompt's length and the number of logprobs.
        """
        self.num_reqs = 0
        self.requests: list[RequestState] = []
        self.row_of: dict[str, int] = {}
        self.num_tokens = np.zeros(max_reqs, np.int32)
        self.num_computed_tokens = np.zeros(max_reqs, np.int32)
        ratios = kernel_blocks_per_block or [1] * len(max_blocks)
        self.block_tables = [
            BlockTable(max_reqs, blocks, ratio) for blocks, ratio in zip(max_blocks, ratios, strict=True)
        ]
        self.sampling = sampling
        self.last_token_ids = mx.zeros((max_reqs,), mx.int32)
        self._preempted: dict[str, RequestState] = {}
        self._max_reqs = max_reqs
        self._new_prompt_logprobs = new_prompt_logprobs

    def update(self, scheduler_output: "SchedulerOutput") -> None:
        """Apply what the scheduler says: requests that left, arrived, resumed or got blocks."""
        arriving = len(scheduler_output.scheduled_new_reqs) + len(
            scheduler_output.scheduled_cached_reqs.resumed_req_ids
        )
        while self.num_reqs + arriving > self._max_reqs:
            self._grow()
        moved = np.arange(self._max_reqs, dtype=np.int32)
        for req_id in scheduler_output.finished_req_ids:
            self._remove(req_id, moved)
            self._preempted.pop(req_id, None)
        for req_id in scheduler_output.preempted_req_ids or ():
            request = self._remove(req_id, moved)
            if request is not None:
                self._preempted[req_id] = request
        for new in scheduler_output.scheduled_new_reqs:
            self._remove(new.req_id, moved)
            self._add_new(new)
        self._update_cached(scheduler_output.scheduled_cached_reqs, moved)
        if (moved != np.arange(self._max_reqs)).any():
            self.last_token_ids = self.last_token_ids[mx.array(moved)]

    def record_sampled(self, rows: Int32[np.ndarray, "emitting"], token_ids: Int32[mx.array, "emitting"]) -> None:
        """Remember the tokens just sampled for ``rows`` as the next inputs of these rows."""
        if len(rows) == 0:
            return
        self.num_tokens[rows] += 1
        self.last_token_ids[mx.array(rows)] = token_ids

    def append_tokens(self, row: int, token_ids: Sequence[int]) -> None:
        """Remember tokens just sampled for ``row`` that the host has read already."""
        request = self.requests[row]
        request.token_ids = np.append(request.token_ids, np.asarray(token_ids, np.int32))
        self.num_tokens[row] = len(request.token_ids)

    def _add_new(self, new: "NewRequestData") -> None:
        tokens = new.prefill_token_ids or new.prompt_token_ids or []
        request = RequestState(
            req_id=new.req_id,
            sampling_params=new.sampling_params or SamplingParams(),
            pooling_params=new.pooling_params,
            lora_request=new.lora_request,
            token_ids=np.asarray(tokens, np.int32),
            num_prompt_tokens=len(new.prompt_token_ids or []),
        )
        self._collect_prompt_logprobs(request)
        self._add(request, new.block_ids, new.num_computed_tokens)

    def _update_cached(self, cached: "CachedRequestData", moved: Int32[np.ndarray, "max_reqs"]) -> None:
        for i, req_id in enumerate(cached.req_ids):
            if req_id in cached.resumed_req_ids:
                self._resume(req_id, cached, i, moved)
                continue
            row = self.row_of[req_id]
            self.num_computed_tokens[row] = cached.num_computed_tokens[i]
            blocks = cached.new_block_ids[i]
            if blocks is not None:
                for table, new_blocks in zip(self.block_tables, blocks, strict=True):
                    table.append_row(row, new_blocks)

    def _resume(self, req_id: str, cached: "CachedRequestData", i: int, moved: Int32[np.ndarray, "max_reqs"]) -> None:
        """Start a preempted request again; the scheduler sends its tokens and all its blocks."""
        request = self._preempted.pop(req_id, None) or self._remove(req_id, moved)
        if request is None:
            raise KeyError(f"[input batch] expected a preempted request, got {req_id}. Report this bug.")
        request.token_ids = np.asarray(cached.all_token_ids[req_id], np.int32)
        request.pooling_states.clean()
        if request.prompt_logprobs is not None:
            self._collect_prompt_logprobs(request)
        self._add(request, cached.new_block_ids[i], cached.num_computed_tokens[i])

    def _collect_prompt_logprobs(self, request: RequestState) -> None:
        k = request.sampling_params.prompt_logprobs
        if k is not None:
            request.prompt_logprobs = self._new_prompt_logprobs(request.num_prompt_tokens, k)

    def _grow(self) -> None:
        """Double the rows: sessions that wait for input keep theirs, beyond the requests that run."""
        self._max_reqs *= 2
        self.num_tokens = np.resize(self.num_tokens, self._max_reqs)
        self.num_computed_tokens = np.resize(self.num_computed_tokens, self._max_reqs)
        self.last_token_ids = mx.concatenate([self.last_token_ids, self.last_token_ids])
        self.sampling.grow(self._max_reqs)
        for group, table in enumerate(self.block_tables):
            self.block_tables[group] = BlockTable(self._max_reqs, table.max_blocks, table.kernel_blocks_per_block)
            for row in range(self.num_reqs):
                self.block_tables[group].add_row(row, table.row(row).tolist())

    def _add(self, request: RequestState, block_ids: Sequence[Sequence[int]], num_computed_tokens: int) -> None:
        row = self.num_reqs
        self.num_reqs += 1
        self.requests.append(request)
        self.row_of[request.req_id] = row
        self.num_tokens[row] = len(request.token_ids)
        self.num_computed_tokens[row] = num_computed_tokens
        for table, blocks in zip(self.block_tables, block_ids, strict=True):
            table.add_row(row, blocks)
        prompt, output = np.split(request.token_ids, [request.num_prompt_tokens])
        self.sampling.add(row, request.req_id, request.sampling_params, prompt.tolist(), output.tolist())

    def _remove(self, req_id: str, moved: Int32[np.ndarray, "max_reqs"]) -> RequestState | None:
        """Take a request out and close its row; None when it is not here.

        ``moved[row]`` is kept as the row where the request now in ``row`` was before this update.
        """
        row = self.row_of.pop(req_id, None)
        if row is None:
            return None
        request = self.requests[row]
        self.sampling.remove(row)
        last = self.num_reqs - 1
        if row != last:
            self.requests[row] = self.requests[last]
            self.row_of[self.requests[row].req_id] = row
            self.num_tokens[row] = self.num_tokens[last]
            self.num_computed_tokens[row] = self.num_computed_tokens[last]
            self.sampling.move(last, row)
            moved[row] = moved[last]
        for table in self.block_tables:
            if row == last:
                table.clear_row(row)
            else:
                table.move_row(last, row)
        self.requests.pop()
        self.num_reqs = last
        return request
