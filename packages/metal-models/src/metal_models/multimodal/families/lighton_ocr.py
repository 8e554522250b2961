"""LightOnOCR: pages of any resolution, whose neighbouring patches are merged as in Mistral 3."""

from typing import Any

from metal_models.multimodal.families import mistral3


class Family(mistral3.Family):
    """LightOnOCR's vision tower and projector."""

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config of a Mistral 3 whose projector has no biases."""
        return super().vlm_config(config) | {"model_type": "mistral3", "multimodal_projector_bias": False}
