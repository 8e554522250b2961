"""Families of models that have a decode program: a file each, and a line in the table."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from metal_models.decode_families import (
    deepseek_v2,
    deepseek_v3,
    falcon_h1,
    granitemoehybrid,
    lfm2,
    llama,
    mamba2,
    minicpm3,
    nemotron_h,
    qwen3_next,
    youtu_llm,
)
from metal_models.decode_program import DecodeProgram
from metal_models.head_split import backbone_path

# Model file of mlx-lm that the backbone is of -> what makes its layers, or says by None that a module is not as usual.
_FAMILIES: dict[str, Callable[[Any], DecodeProgram | None]] = {
    "deepseek_v2": deepseek_v2.program,
    "deepseek_v3": deepseek_v3.program,
    "falcon_h1": falcon_h1.program,
    "glm4_moe_lite": deepseek_v3.program,
    "granitemoehybrid": granitemoehybrid.program,
    "lfm2": lfm2.program,
    "lfm2_moe": lfm2.program,
    "llama": llama.program,
    "mamba2": mamba2.program,
    "minicpm3": minicpm3.program,
    "nemotron_h": nemotron_h.program,
    "qwen2": llama.program,
    "qwen3": llama.program,
    "qwen3_5": qwen3_next.program,
    "qwen3_next": qwen3_next.program,
    "youtu_llm": youtu_llm.program,
}

# Families whose program needs a kernel that users can switch off.
_GATED_DELTA = {"qwen3_5", "qwen3_next"}
_LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu_llm"}


def decode_program(model: nn.Module, *, gdn_kernel: bool = True, mla_kernel: bool = True) -> DecodeProgram | None:
    """Return the decode program of ``model``; None if its family has none or a module is not as its family's are.

    Joins linear layers in place; the model computes as before.

    Args:
        model: The model.
        gdn_kernel: Whether gated delta nets may use their kernel.
        mla_kernel: Whether latent attention may use its kernel.
    """
    backbone: Any = model
    for name in backbone_path(model):
        backbone = getattr(backbone, name)
    package, _, file = type(backbone).__module__.rpartition(".")
    if package != "mlx_lm.models" or file not in _FAMILIES or not backbone.layers:
        return None
    if (file in _GATED_DELTA and not gdn_kernel) or (file in _LATENT and not mla_kernel):
        return None
    return _FAMILIES[file](backbone)
