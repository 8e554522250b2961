"""LLaVA-NeXT with SigLIP, as Granite Vision has it."""

from typing import Any

from metal_models.multimodal.families import llava_next


class Family(llava_next.Family):
    """Granite Vision's tower and projector."""

    package = "granite_vision"
    renamers = ("", "vision_tower")
    vision_types = frozenset({"siglip_vision_model"})

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Take the tower without a pooling head."""
        super().adapt(parts, config)
        del parts.vision_tower.vision_model["head"]
