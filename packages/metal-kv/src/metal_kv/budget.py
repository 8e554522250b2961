"""How the memory limit is divided between weights, one step, recurrent states and cache blocks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from metal_kv.errors import NotEnoughMemoryError

_GB = 1e9


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / _GB:.2f}GB"


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """Return the largest n in 0..upper that fits; ``fits`` must be true, then false, as n grows."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class MemoryBudget:
    """The memory plan of one device; all sizes in bytes, printed in GB of 1e9 bytes.

    Attributes:
        metal_limit: What the device offers.
        fraction: Share of it that may be planned with.
        usable: That share in bytes.
        model_memory: Weights.
        overhead: Peak of one worst-case step beyond weights and cache.
        kv_budget: What is left for cache blocks; negative when nothing is.
        per_block_bytes: What one block takes over all layers.
        block_size: Tokens per block.
        recurrent_state: States of recurrent layers kept outside the blocks.
    """

    metal_limit: int
    fraction: float
    usable: int
    model_memory: int
    overhead: int
    kv_budget: int
    per_block_bytes: int
    block_size: int
    recurrent_state: int = 0

    @classmethod
    def plan(
        cls,
        metal_limit: int,
        fraction: float,
        *,
        model_memory: int,
        overhead: int,
        per_block_bytes: int,
        block_size: int,
        recurrent_state: int = 0,
        kv_budget_limit: int | None = None,
    ) -> "MemoryBudget":
        """Divide ``metal_limit``; ``kv_budget_limit`` bounds the cache where more would fit."""
        usable = int(metal_limit * fraction)
        kv_budget = usable - model_memory - overhead - recurrent_state
        if kv_budget_limit is not None:
            kv_budget = min(kv_budget, kv_budget_limit)
        return cls(
            metal_limit,
            fraction,
            usable,
            model_memory,
            overhead,
            kv_budget,
            per_block_bytes,
            block_size,
            recurrent_state,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks the cache gets, the null block included."""
        return max(0, self.kv_budget // self.per_block_bytes)

    @property
    def max_tokens_cached(self) -> int:
        """Rows of all blocks; the null block's, which hold nothing, included."""
        return self.num_blocks * self.block_size

    def max_model_len(self, upper: int, blocks_per_request: Callable[[int], int] | None = None) -> int:
        """Return the longest request, at most ``upper`` tokens, that the blocks hold.

        Args:
            upper: The longest to consider.
            blocks_per_request: Blocks a request of so many tokens holds; None for full attention.
        """
        needed = blocks_per_request or self._full_attention_blocks
        return _largest(lambda tokens: self._blocks_bytes(needed(tokens)) <= self.kv_budget, upper)

    def require(
        self,
        max_model_len: int | None = None,
        blocks_per_request: Callable[[int], int] | None = None,
        *,
        other_formats: Mapping[str, int] | None = None,
        max_num_seqs: int | None = None,
    ) -> None:
        """Refuse a plan that does not hold one request, and say what would.

        Args:
            max_model_len: Tokens of that request; None for one block.
            blocks_per_request: Blocks a request of so many tokens holds; None for full attention.
            other_formats: Bytes per block under other settings of the cache's format, by what to set.
            max_num_seqs: Requests ``recurrent_state`` is for, if fewer are an option.

        Raises:
            NotEnoughMemoryError: Names all figures and every single change that makes the request fit.
        """
        blocks_for = blocks_per_request or self._full_attention_blocks
        needed = self._blocks_bytes(blocks_for(max_model_len or 1))
        if needed <= self.kv_budget:
            return
        remedies = [
            *self._more_memory(needed),
            *self._shorter_requests(max_model_len, blocks_per_request),
            *self._smaller_blocks(needed, other_formats or {}),
            *self._fewer_states(needed, max_num_seqs),
            *self._smaller_model(needed),
        ]
        goal = f"one request of {max_model_len} tokens" if max_model_len else "one block of tokens"
        raise NotEnoughMemoryError(
            f"Paged attention: not enough Metal memory for KV cache. {self._shares()}. "
            f"Needed for {goal}: {_gigabytes(needed)}, per_block_bytes={self.per_block_bytes}. "
            f"Mitigations (any one is enough): {'; '.join(remedies)}."
        )

    def __str__(self) -> str:
        return (
            f"Paged attention memory breakdown: {self._shares()}, per_block_bytes={self.per_block_bytes}, "
            f"num_blocks={self.num_blocks}, max_tokens_cached={self.max_tokens_cached}"
        )

    def _shares(self) -> str:
        states = f"recurrent_state={_gigabytes(self.recurrent_state)}, " if self.recurrent_state else ""
        return (
            f"metal_limit={_gigabytes(self.metal_limit)}, fraction={self.fraction:.2f}, "
            f"usable_metal={_gigabytes(self.usable)}, model_memory={_gigabytes(self.model_memory)}, "
            f"overhead={_gigabytes(self.overhead)}, {states}kv_budget={_gigabytes(self.kv_budget)}"
        )

    def _full_attention_blocks(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.block_size)

    def _blocks_bytes(self, num_blocks: int) -> int:
        return (num_blocks + 1) * self.per_block_bytes  # one more: the null block

    @property
    def _unbounded_kv_budget(self) -> int:
        """What the cache would get without a bound of its own."""
        return self.usable - self.model_memory - self.overhead - self.recurrent_state

    def _more_memory(self, needed: int) -> list[str]:
        if self._unbounded_kv_budget >= needed:
            return [f"let the KV cache have at least {needed} bytes (--kv-cache-memory-bytes)"]
        if self.kv_budget < self._unbounded_kv_budget:
            return []
        total = self.model_memory + self.overhead + self.recurrent_state + needed
        hundredths = math.ceil(total * 100 / self.metal_limit)
        while hundredths <= 100 and int(self.metal_limit * (hundredths / 100)) < total:
            hundredths += 1
        if hundredths > 100:
            return []
        return [f"increase VLLM_METAL_MEMORY_FRACTION (the memory fraction) to at least {hundredths / 100:.2f}"]

    def _shorter_requests(
        self, max_model_len: int | None, blocks_per_request: Callable[[int], int] | None
    ) -> list[str]:
        longest = self.max_model_len(max_model_len or 0, blocks_per_request)
        return [f"reduce --max-model-len to {longest} or less"] if longest else []

    def _smaller_blocks(self, needed: int, other_formats: Mapping[str, int]) -> list[str]:
        """The setting that changes least, that is whose blocks are largest."""
        num_blocks = needed // self.per_block_bytes
        fitting = {size: setting for setting, size in other_formats.items() if num_blocks * size <= self.kv_budget}
        return [f"cache in another format: {fitting[max(fitting)]}"] if fitting else []

    def _fewer_states(self, needed: int, max_num_seqs: int | None) -> list[str]:
        if not max_num_seqs or not self.recurrent_state:
            return []
        left = self._unbounded_kv_budget + self.recurrent_state - needed
        num_seqs = min(max_num_seqs - 1, left * max_num_seqs // self.recurrent_state)
        return [f"reduce --max-num-seqs to {num_seqs} or less"] if num_seqs > 0 else []

    def _smaller_model(self, needed: int) -> list[str]:
        missing = needed - self._unbounded_kv_budget
        if not 0 < missing < self.model_memory:
            return []
        return [f"use a model, or a quantization of it, that is at least {_gigabytes(missing)} smaller"]
