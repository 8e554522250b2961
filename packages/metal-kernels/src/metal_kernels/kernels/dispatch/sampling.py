"""From logits to tokens."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.kernels.dispatch.verdict import FLOAT_DTYPES, MIN_CHANNELS, Accepted, Rejected

_MAX_VOCAB = 2**22  # token ids pass through float32, and integers of 64 bits hold the sum of so many weights


@dataclass(frozen=True)
class SampleVariant:
    """How sampling is laid out.

    Args:
        threads: Of the threadgroup that takes a row; a power of two from 32.
    """

    threads: int


def sample_kernel(target: Target, dtype: mx.Dtype, vocab: int) -> Accepted[SampleVariant] | Rejected:
    """Decide on the kernels that adjust logits and choose tokens, for rows of ``vocab`` logits."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"logits are {dtype}; kernels know float16, bfloat16 and float32")
    if not MIN_CHANNELS <= vocab <= _MAX_VOCAB:
        return Rejected(f"rows of {vocab} logits; the kernels take {MIN_CHANNELS} to {_MAX_VOCAB}")
    return Accepted(SampleVariant(512 if target == "cuda" else 256))  # Metal may refuse threads with many registers
