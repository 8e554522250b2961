"""Qwen2-VL: patches of any resolution."""

from metal_models.multimodal.families import qwen2_5_vl


class Family(qwen2_5_vl.Family):
    """Qwen2-VL's vision tower."""

    package = "qwen2_vl"
