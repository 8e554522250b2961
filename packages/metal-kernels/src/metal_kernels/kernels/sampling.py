"""From logits to tokens, a kernel for each of two steps."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.kernels.dispatch import SampleVariant
from metal_kernels.kernels.source import PortableKernel, constants

_RUN = 8  # tokens that a thread adjusts
_ADJUST_THREADS = 256
_SAMPLE = PortableKernel(
    "sample_rows",
    ("logits_in", "uniform_in", "rules_in"),
    ("token_out",),
    "sample_rows.metal",
    contiguous=True,
    headers=("words", "bits", "counters", "weights"),
)
_ADJUST = PortableKernel(
    "adjust_logits",
    ("logits_in", "history_in", "penalties_in", "bitmask_in"),
    ("out",),
    "adjust_logits.metal",
    contiguous=True,
    headers=("words", "bits"),
)


def sample_rows(
    logits: Float[mx.array, "rows vocab"],
    uniform: Float[mx.array, "*numbers"],
    rules: Float[mx.array, "rules columns"],
    variant: SampleVariant,
) -> Int32[mx.array, "rows"]:
    """Choose a token for each row; see :func:`metal_kernels.sample_rows`."""
    rows, vocab = logits.shape
    (token_ids,) = _SAMPLE(
        [logits, uniform, rules],
        [((rows,), mx.int32)],
        threadgroups=(rows, 1),
        threads=variant.threads,
        template={"T": logits.dtype, "VOCAB": vocab, "THREADS": variant.threads},
    )
    return token_ids


def adjust_logits(
    logits: Float[mx.array, "rows vocab"],
    *,
    history: Float[mx.array, "slots tokens"] | None = None,
    penalties: Float[mx.array, "penalties columns"] | None = None,
    bitmask: Int32[mx.array, "masks words"] | None = None,
) -> Float[mx.array, "rows vocab"]:
    """Apply penalties and a grammar's bits; see :func:`metal_kernels.adjust_logits`."""
    rows, vocab = logits.shape
    none = constants(0.0)
    penalised = history is not None and penalties is not None
    run = _RUN if vocab % _RUN == 0 else 1
    (adjusted,) = _ADJUST(
        [
            logits,
            none if history is None else history,
            none if penalties is None else penalties,
            none.view(mx.int32) if bitmask is None else bitmask,
        ],
        [((rows, vocab), mx.float32)],
        threadgroups=(-(-vocab // (run * _ADJUST_THREADS)), rows),
        threads=_ADJUST_THREADS,
        template={
            "T": logits.dtype,
            "VOCAB": vocab,
            "THREADS": _ADJUST_THREADS,
            "PENALTIES": penalised,
            "GRAMMAR": bitmask is not None,
            "WORDS": 0 if bitmask is None else bitmask.shape[1],
        },
    )
    return adjusted
