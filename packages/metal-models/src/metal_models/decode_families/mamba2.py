"""Mamba 2 without attention."""

from typing import Any

import mlx.core as mx

from metal_models.decode_program import DecodeLayer, DecodeProgram
from metal_models.mamba2_mixer import Mamba2Mixer


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    if not all(Mamba2Mixer.possible(layer.mixer) for layer in backbone.layers):
        return None
    layers = [DecodeLayer(_mixer(layer.mixer), layer.norm) for layer in backbone.layers]
    return DecodeProgram(backbone.embeddings, layers, backbone.norm_f)


def _mixer(module: Any) -> Mamba2Mixer:
    weight, eps = module.norm.weight, module.norm.eps
    return Mamba2Mixer.of(module, lambda values: mx.fast.rms_norm(values, weight, eps))
