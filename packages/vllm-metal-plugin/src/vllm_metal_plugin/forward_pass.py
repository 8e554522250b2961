"""What computes the hidden rows of a step: a model over pages, or over caches of each request's own."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import mlx.core as mx
from jaxtyping import Float

from metal_kv import KVCachePool
from metal_models import PagedModel
from metal_models.contiguous import ContiguousModel, RequestRows
from vllm_metal_plugin.errors import UnsupportedConfigError
from vllm_metal_plugin.input_batch import InputBatch, RequestState
from vllm_metal_plugin.request_checks import SALT
from vllm_metal_plugin.step_inputs import StepInputs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class ForwardPass(ABC):
    """A model and its cache memory, if it has any, as a runner sees them."""

    @abstractmethod
    def begin(self, scheduler_output: "SchedulerOutput") -> None:
        """Apply what the scheduler says of the cache, before the step is built; also when it has no rows."""

    @abstractmethod
    def forward(self, inputs: StepInputs, batch: InputBatch) -> Float[mx.array, "tokens hidden"]:
        """Return the hidden rows of a step, lazily."""

    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """Return what to evaluate with the step so that its cache writes are done."""

    def failed_requests(self) -> frozenset[str]:
        """Return requests whose rows are worth nothing: they have to end with an error."""
        return frozenset()

    def compute_logits(self, hidden: Float[mx.array, "rows hidden"]) -> Float[mx.array, "rows vocab"]:
        """Apply the model's head to some hidden rows.

        Raises:
            UnsupportedConfigError: It has none: it is a model for pooling alone.
        """
        raise UnsupportedConfigError("[forward] expected a model with a vocabulary head, got one for pooling alone.")


class PagedForward(ForwardPass):
    """A model over the pages of a pool.

    Attributes:
        pool: The same pages, for those who save and restore what lies there.
    """

    def __init__(self, model: PagedModel, pool: KVCachePool) -> None:
        self._model = model
        self.pool = pool

    def begin(self, scheduler_output: "SchedulerOutput") -> None:
        """Zero and copy blocks, in this order."""
        if scheduler_output.new_block_ids_to_zero:
            self.pool.zero_blocks(scheduler_output.new_block_ids_to_zero)
        if scheduler_output.kv_cache_block_copies:
            self.pool.copy_blocks([tuple(copy) for copy in scheduler_output.kv_cache_block_copies])

    def forward(self, inputs: StepInputs, batch: InputBatch) -> Float[mx.array, "tokens hidden"]:
        """Write the step's rows to the pool and attend over the block tables."""
        del batch
        return self._model.forward(
            inputs.token_ids,
            inputs.metadata,
            self.pool,
            embeddings=inputs.embeddings,
            rope_positions=inputs.rope_positions,
            bidirectional=inputs.bidirectional,
        )

    def compute_logits(self, hidden: Float[mx.array, "rows hidden"]) -> Float[mx.array, "rows vocab"]:
        """Apply the model's head."""
        return self._model.compute_logits(hidden)

    def arrays(self) -> list[mx.array]:
        """Return the pool's arrays."""
        return self.pool.arrays()


class ContiguousForward(ForwardPass):
    """A model over mlx-lm's caches; the scheduler's blocks are only its count of tokens."""

    def __init__(self, model: ContiguousModel) -> None:
        self._model = model

    def begin(self, scheduler_output: "SchedulerOutput") -> None:
        """Forget requests that ended or were preempted."""
        self._model.forget({*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())})

    def forward(self, inputs: StepInputs, batch: InputBatch) -> Float[mx.array, "tokens hidden"]:
        """Compute each request's rows over its own cache."""
        query_lens = inputs.query_start_loc[1:] - inputs.query_start_loc[:-1]
        requests = [
            RequestRows(
                req_id,
                begin=int(end) - int(count),
                end=int(end),
                token_ids=batch.requests[row].token_ids,
                salt=_salt(batch.requests[row]),
            )
            for req_id, row, end, count in zip(inputs.req_ids, inputs.rows, inputs.seq_lens, query_lens, strict=True)
        ]
        return self._model.forward(inputs.token_ids, requests)

    def compute_logits(self, hidden: Float[mx.array, "rows hidden"]) -> Float[mx.array, "rows vocab"]:
        """Apply the model's head."""
        return self._model.compute_logits(hidden)

    def arrays(self) -> list[mx.array]:
        """Return the caches that the step wrote to."""
        return self._model.arrays()


def _salt(request: RequestState) -> str | None:
    """Return under what salt a request shares prefixes; not at all when it needs the row of every prompt token."""
    if request.pooling_params is not None or request.sampling_params.prompt_logprobs is not None:
        return None
    salt = str((request.sampling_params.extra_args or {}).get(SALT, ""))
    adapter = request.lora_request
    return salt if adapter is None else f"{salt}\0{adapter.lora_int_id} {adapter.lora_name}"
