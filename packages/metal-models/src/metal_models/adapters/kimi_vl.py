"""Kimi-VL: checkpoints as they are published, whose latents' projections are in one tensor."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v3, kimi_vl
from mlx_lm.models.kimi_vl import ModelArgs

__all__ = ["Model", "ModelArgs"]

_OWN = "language_model."


class Model(kimi_vl.Model):
    """mlx-lm's Kimi-VL; parameters have the same names."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the language model's tensors, named and stacked as those of DeepSeek-V3."""
        text = {name.removeprefix(_OWN): array for name, array in weights.items() if name.startswith(_OWN)}
        stacked: Any = deepseek_v3.Model.sanitize
        found: dict[str, mx.array] = stacked(self.language_model, text)
        return {f"{_OWN}{name}": array for name, array in found.items()}
