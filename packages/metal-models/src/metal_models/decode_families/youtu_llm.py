"""Youtu-LLM: dense layers with latent attention and one projection from latents to keys and values."""

from typing import Any

from metal_models.decode_families.deepseek_v2 import joined_heads_possible, separate_heads
from metal_models.decode_families.deepseek_v3 import latent_program
from metal_models.decode_program import DecodeProgram
from metal_models.rotation import find_rotations


def program(backbone: Any) -> DecodeProgram | None:
    """Return the program of a backbone of this family; None if a module is not as usual."""
    rotations = find_rotations([layer.self_attn.rope for layer in backbone.layers])
    if rotations is None or not all(map(joined_heads_possible, backbone.layers)):
        return None
    return latent_program(backbone, rotations, [separate_heads(layer.self_attn) for layer in backbone.layers])
