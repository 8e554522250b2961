"""From the logits of a step's rows to their tokens."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_rows
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError

_MIN_ELEMENTS = 8  # MLX puts smaller inputs in another Metal address space
_LOG2_E = 1.4426950408889634


def serves_sampling(dtype: mx.Dtype, vocab: int) -> bool:
    """Whether kernels adjust such logits and choose tokens; their twins sort the vocabulary, which is slow."""
    return isinstance(kernels.sample_kernel(target(), dtype, vocab), kernels.Accepted)


def pack_sampling_rules(
    temperature: Float32[np.ndarray, "rows"],
    min_p: Float32[np.ndarray, "rows"],
    top_k: Int32[np.ndarray, "rows"],
    top_p: Float32[np.ndarray, "rows"],
) -> Float32[np.ndarray, "rows 8"]:
    """Return rules as :func:`sample_rows` takes them.

    Args:
        temperature: 0 takes the largest logit.
        min_p: Least weight of a token, of the heaviest one's; 0 keeps all.
        top_k: How many tokens are kept; 0 or the vocabulary's size keeps all.
        top_p: Least share of the weight that is kept; 1 keeps all.
    """
    rules = np.zeros((len(temperature), 8), np.float32)
    with np.errstate(divide="ignore"):
        rules[:, 0] = np.where(temperature > 0, _LOG2_E / temperature, 0.0)
        rules[:, 1] = 0.0 - np.log2(min_p)  # never -0, whose bits are large
    rules[:, 2], rules[:, 3] = top_k, top_p
    return rules


def sample_rows(
    logits: Float[mx.array, "rows vocab"],
    uniform: Float[mx.array, "*numbers"],
    rules: Float[mx.array, "rules columns"],
) -> Int32[mx.array, "rows"]:
    """Return a token for each row, by temperature, min-p, top-k and top-p in this order.

    A token's weight is ``exp((logit - largest logit) / temperature)``, as an integer of 2^-40 of the heaviest one's.
    Each of min-p, top-k and top-p keeps tokens down to some distance ``(largest logit - logit) / temperature`` in
    float32; tokens at equal distances stay together. top-p keeps the fewest heaviest tokens whose weight reaches that
    share of what min-p and top-k left. The token is the first, in the order of ids, with which the sum of what is kept
    exceeds ``uniform`` times the total. Sums of integers know no order, so a row's token does not depend on others.

    Args:
        logits: In any float dtype; -inf for tokens that are forbidden. Of a row with nothing else, the last is drawn.
        uniform: A number from 0 up to 1 for each row; what follows the rows' is ignored, at least eight in all.
        rules: From :func:`pack_sampling_rules`. Rows at temperature 0 get the first of their largest logits.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    rows, vocab = logits.shape
    require_rows("sample_rows", "rules", rules, (rows, 8))
    if uniform.size < max(rows, _MIN_ELEMENTS):
        raise MetalKernelsError(
            f"[sample_rows] expected numbers for {rows} rows, at least {_MIN_ELEMENTS}, got {uniform.size}. Pad them."
        )
    if rows == 0:
        return mx.zeros(0, mx.int32)
    chosen = kernels.sample_kernel(target(), logits.dtype, vocab)
    if isinstance(chosen, kernels.Accepted):
        return kernels.sample_rows(logits, uniform, rules, chosen.variant)
    return reference.sample_rows(logits, uniform, rules)


def adjust_logits(
    logits: Float[mx.array, "rows vocab"],
    *,
    history: Float[mx.array, "slots tokens"] | None = None,
    penalties: Float[mx.array, "penalties columns"] | None = None,
    bitmask: Int32[mx.array, "masks words"] | None = None,
) -> Float[mx.array, "rows vocab"]:
    """Return float32 logits after penalties and a grammar's bits.

    Repetition divides positive and multiplies negative logits of tokens that occurred (arXiv:1909.05858, section 4.1);
    frequency is subtracted once for each time that a token was emitted, presence once for all.

    Args:
        logits: In any float dtype.
        history: How often each token was emitted, in float32, and a half more if it occurs in the prompt.
        penalties: Of each row: its row of ``history`` or -1, then repetition, frequency and presence. The rest is
            ignored.
        bitmask: Bit ``i`` of word ``w`` allows token ``32 * w + i``; others become -inf. A row for each row.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    rows, vocab = logits.shape
    if (history is None) != (penalties is None):
        raise MetalKernelsError("[adjust_logits] expected a history with penalties, got one of them. Pass both.")
    if history is not None and penalties is not None:
        require_rows("adjust_logits", "history", history, (history.shape[0], vocab))
        require_rows("adjust_logits", "penalties", penalties, (rows, 8))
    words = -(-vocab // 32)
    if bitmask is not None and (bitmask.shape[0] != rows or bitmask.shape[1] < words):
        raise MetalKernelsError(
            f"[adjust_logits] expected {words} words for each of {rows} rows, got {bitmask.shape}. Pad the bitmask."
        )
    small = any(array is not None and array.size < _MIN_ELEMENTS for array in (history, bitmask))
    served = isinstance(kernels.sample_kernel(target(), logits.dtype, vocab), kernels.Accepted)
    adjust = kernels.adjust_logits if served and rows and not small else reference.adjust_logits
    return adjust(logits, history=history, penalties=penalties, bitmask=bitmask)
