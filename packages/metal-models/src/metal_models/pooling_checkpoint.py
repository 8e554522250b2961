"""Checkpoints of models that embed or classify: without a vocabulary head, or with a score head in its place."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_models.head_split import backbone_path

SCORE = "score"
"""Name of the linear layer from hidden rows to labels, in the checkpoint and on the module."""

_VOCABULARY_HEAD = "lm_head"


def for_pooling(model_class: type[nn.Module]) -> type[nn.Module]:
    """Return ``model_class`` with a ``sanitize`` that also takes checkpoints of pooling models.

    These may name tensors from the backbone on, lack the vocabulary head (the module then returns hidden rows as
    logits), and have a score head, which the module keeps as ``score`` and does not apply.
    """
    base: Any = model_class

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = dict(weights)
        score = {name: weights.pop(name) for name in [n for n in weights if n.startswith(f"{SCORE}.")]}
        if not any(name.partition(".")[0] in self for name in weights):
            prefix = ".".join(backbone_path(self))
            weights = {f"{prefix}.{name}": array for name, array in weights.items()}
        if _VOCABULARY_HEAD in self and not any(name.startswith(f"{_VOCABULARY_HEAD}.") for name in weights):
            self[_VOCABULARY_HEAD] = nn.Identity()
        if f"{SCORE}.weight" in score:
            labels, hidden = score[f"{SCORE}.weight"].shape
            self[SCORE] = nn.Linear(hidden, labels, bias=f"{SCORE}.bias" in score)
        own = base.sanitize(self, weights) if hasattr(base, "sanitize") else weights
        return {**own, **score}

    return type(base.__name__, (base,), {"sanitize": sanitize, "__module__": base.__module__})
