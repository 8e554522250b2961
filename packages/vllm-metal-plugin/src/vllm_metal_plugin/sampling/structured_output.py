"""Which tokens a grammar allows, as rows of bits, and how they reach the logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from vllm_metal_plugin.errors import VllmMetalPluginError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput


@dataclass(frozen=True, eq=False)
class GrammarRows:
    """Allowed tokens of the constrained logits rows of one sampler call."""

    rows: np.ndarray
    """int32 [n]: which logits row each bitmask row belongs to."""
    bitmask: np.ndarray
    """int32 [n, words]: bit ``i`` of word ``w``, least significant first, allows token ``32 * w + i``."""

    @classmethod
    def from_vllm(
        cls,
        grammar_output: "GrammarOutput",
        logits_row: Mapping[str, int],
        num_draft_tokens: Mapping[str, int] | None = None,
    ) -> "GrammarRows | None":
        """Line the scheduler's bitmask up with the logits.

        vLLM 0.32 packs ``1 + num_draft_tokens`` rows per request; 0.33 gives every request the same
        number of rows. Both are understood.

        Args:
            grammar_output: What ``sample_tokens`` was called with.
            logits_row: First logits row of each request that is sampled; others are skipped.
            num_draft_tokens: Draft tokens scheduled per request; absent means none.

        Returns:
            None when no sampled request is constrained.

        Raises:
            VllmMetalPluginError: The bitmask has a number of rows that fits neither layout.
        """
        req_ids = grammar_output.structured_output_request_ids
        drafts = num_draft_tokens or {}
        lengths = np.array([1 + drafts.get(req_id, 0) for req_id in req_ids], dtype=np.int64)
        num_rows = len(grammar_output.grammar_bitmask)
        starts = np.cumsum(lengths) - lengths
        if num_rows != int(lengths.sum()):
            stride = num_rows // max(len(req_ids), 1)
            if not req_ids or stride * len(req_ids) != num_rows or stride < lengths.max():
                raise VllmMetalPluginError(
                    f"[GrammarRows.from_vllm] expected {int(lengths.sum())} bitmask rows or as many for each "
                    f"request, got {num_rows} for {len(req_ids)} requests. Check the vLLM version."
                )
            starts = np.arange(len(req_ids)) * stride
        source: list[int] = []
        target: list[int] = []
        for req_id, start, length in zip(req_ids, starts.tolist(), lengths.tolist(), strict=True):
            row = logits_row.get(req_id)
            if row is not None:
                source.extend(range(start, start + length))
                target.extend(range(row, row + length))
        if not source:
            return None
        return cls(np.array(target, dtype=np.int32), grammar_output.grammar_bitmask[source])


@lru_cache(maxsize=1)
def _mask_of_byte() -> mx.array:
    """Float32 [256, 8]: 0 where the bit (least significant first) is set, -inf where it is not."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = mx.array(np.where(bits == 1, 0.0, -np.inf).astype(np.float32))
    mx.eval(table)
    return table


def pack_bits(allowed: np.ndarray) -> np.ndarray:
    """Pack bool [rows, tokens] into the int32 [rows, words] form of a grammar bitmask."""
    columns = -(-allowed.shape[1] // 32) * 32
    padded = np.zeros((allowed.shape[0], columns), dtype=bool)
    padded[:, : allowed.shape[1]] = allowed
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)


def additive_mask(bitmask: np.ndarray, vocab_size: int) -> Float[mx.array, "rows vocab"]:
    """Return 0 for allowed and -inf for forbidden tokens (lazy).

    Args:
        bitmask: int32 [rows, words]; tokens beyond its width are forbidden.
        vocab_size: Width of the logits.
    """
    packed = np.ascontiguousarray(bitmask, dtype=np.int32).view(np.uint8)
    width = -(-vocab_size // 8)
    if packed.shape[1] < width:
        packed = np.pad(packed, ((0, 0), (0, width - packed.shape[1])))
    mask = _mask_of_byte()[mx.array(packed[:, :width])].reshape(len(packed), width * 8)
    return mask[:, :vocab_size]


def apply_grammar(logits: Float[mx.array, "rows vocab"], grammar: GrammarRows) -> Float[mx.array, "rows vocab"]:
    """Return float32 logits with every token that the grammar forbids at -inf (lazy)."""
    return add_rows(logits, grammar.rows, additive_mask(grammar.bitmask, logits.shape[1]))


def add_rows(
    logits: Float[mx.array, "rows vocab"], rows: np.ndarray, addend: Float[mx.array, "some vocab"]
) -> Float[mx.array, "rows vocab"]:
    """Return float32 ``logits`` with ``addend[i]`` added to row ``rows[i]`` (rows are distinct)."""
    logits = logits.astype(mx.float32)
    if len(rows) == logits.shape[0] and np.array_equal(rows, np.arange(len(rows))):
        return logits + addend
    return logits.at[mx.array(rows)].add(addend)
