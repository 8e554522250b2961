"""GLM-OCR: pages of any resolution, as patches."""

from typing import Any

from metal_models.multimodal.families import glm4v


class Family(glm4v.Family):
    """GLM-OCR's vision tower."""

    package = "glm_ocr"

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Change nothing: patches have no places but those that turn them."""
