"""The LoRA adapters that vLLM's requests name, on a model that applies one to each row."""

from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from jaxtyping import Float
from vllm.exceptions import LoRAAdapterNotFoundError

from metal_models import AdapterError
from metal_models.lora import LoraLayers
from vllm_metal_plugin.forward_pass import ForwardPass
from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.log import metal_logger
from vllm_metal_plugin.step_inputs import StepInputs

if TYPE_CHECKING:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import SchedulerOutput

logger = metal_logger(__name__)


class LoraAdapters:
    """Loads adapters when they are first named; the least recently used go when there are too many.

    Args:
        layers: The model's.
        max_rank: The largest rank that is accepted (``--max-lora-rank``).
        capacity: How many stay loaded (``--max-cpu-loras``); at least as many as one step may use.
    """

    def __init__(self, layers: LoraLayers, *, max_rank: int, capacity: int) -> None:
        self._layers = layers
        self._max_rank = max_rank
        self._capacity = capacity
        self._by_use: dict[int, LoRARequest] = {}
        self._pinned: set[int] = set()

    @classmethod
    def from_vllm(cls, layers: LoraLayers, config: "LoRAConfig | None") -> "LoraAdapters":
        """Make what ``config`` says; without one, no adapter can be added."""
        if config is None:
            return cls(layers, max_rank=0, capacity=0)
        return cls(layers, max_rank=config.max_lora_rank, capacity=config.max_cpu_loras)

    @property
    def reserved_bytes(self) -> int:
        """Memory that the adapters take at most."""
        return self._capacity * self._layers.bytes_at_rank(self._max_rank)

    @property
    def ids(self) -> set[int]:
        """Adapters that are loaded."""
        return set(self._by_use)

    def add(self, request: "LoRARequest", in_use: frozenset[int] = frozenset()) -> bool:
        """Load an adapter unless it is loaded, or note that it is used.

        Args:
            request: Its number and path.
            in_use: Numbers of adapters that have to stay.

        Raises:
            AdapterError: It does not fit the model or the settings, or there is no room.
            LoRAAdapterNotFoundError: There is no such directory.
        """
        number = request.lora_int_id
        if number in self._by_use and not request.load_inplace:
            self._by_use[number] = self._by_use.pop(number)
            return True
        if not Path(request.lora_path).is_dir():
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
        adapter = self._layers.load(request.lora_path, max_rank=self._max_rank)
        self._by_use.pop(number, None)
        while len(self._by_use) >= self._capacity:
            self._evict(in_use)
        self._layers.add(number, adapter)
        self._by_use[number] = request
        logger.info("Loaded LoRA adapter %s: %.1f MB", request.lora_name, adapter.nbytes / 1e6)
        return True

    def remove(self, number: int) -> bool:
        """Forget an adapter; a request that names it loads it again."""
        self._pinned.discard(number)
        self._by_use.pop(number, None)
        return self._layers.remove(number)

    def pin(self, number: int) -> bool:
        """Keep an adapter loaded until it is removed; return whether it was loaded."""
        if number in self._by_use:
            self._pinned.add(number)
        return number in self._by_use

    def _evict(self, in_use: frozenset[int]) -> None:
        oldest = next((number for number in self._by_use if number not in in_use | self._pinned), None)
        if oldest is None:
            raise AdapterError(
                f"[lora] expected room for one more adapter, got {self._capacity} that have to stay. "
                "Raise --max-cpu-loras."
            )
        self.remove(oldest)


class LoraForward(ForwardPass):
    """A forward pass in which every request may have an adapter.

    Args:
        forward_pass: The model and its cache.
        layers: The model's layers that adapters reach.
        adapters: Loads what requests name.
    """

    def __init__(self, forward_pass: ForwardPass, layers: LoraLayers, adapters: LoraAdapters) -> None:
        self._forward_pass = forward_pass
        self._layers = layers
        self._adapters = adapters

    def begin(self, scheduler_output: "SchedulerOutput") -> None:
        """Apply what the scheduler says of the cache."""
        self._forward_pass.begin(scheduler_output)

    def forward(self, inputs: StepInputs, batch: InputBatch) -> Float[mx.array, "tokens hidden"]:
        """Return hidden rows, each computed with the adapter of its request."""
        requests = [batch.requests[row].lora_request for row in inputs.rows]
        named = {request.lora_int_id: request for request in requests if request is not None}
        for number, request in named.items():
            if number not in self._adapters.ids:
                self._adapters.add(request, frozenset(named))
        numbers = np.array([0 if request is None else request.lora_int_id for request in requests], np.int32)
        with self._layers.applied(np.repeat(numbers, np.diff(inputs.query_start_loc))):
            return self._forward_pass.forward(inputs, batch)

    def compute_logits(self, hidden: Float[mx.array, "rows hidden"]) -> Float[mx.array, "rows vocab"]:
        """Apply the model's head, which no adapter changes."""
        return self._forward_pass.compute_logits(hidden)

    def arrays(self) -> list[mx.array]:
        """Return what to evaluate with the step."""
        return self._forward_pass.arrays()

    def failed_requests(self) -> frozenset[str]:
        """Return requests that have to end with an error."""
        return self._forward_pass.failed_requests()
