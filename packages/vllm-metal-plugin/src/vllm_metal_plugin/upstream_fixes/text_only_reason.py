"""vLLM 0.32 refuses an image in a text-only server as if ``--limit-mm-per-prompt`` could change that.

Can go when ``BaseProcessingInfo.validate_num_items`` has another text for ``--language-model-only``.
"""

from functools import wraps
from typing import Any

_reason = ""
_installed = False


def install(reason: str) -> None:
    """Let the refusal say why the server takes text only; the latest reason counts."""
    global _installed, _reason
    _reason = reason
    if _installed:
        return
    _installed = True
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.processing import BaseProcessingInfo

    original = BaseProcessingInfo.validate_num_items

    @wraps(original)
    def validate_num_items(self: Any, modality: str, num_items: int) -> None:
        if num_items and self.ctx.get_mm_config().language_model_only:
            raise VLLMValidationError(
                f"This server takes text only, no {modality}: {_reason}.", parameter=modality, value=num_items
            )
        original(self, modality, num_items)

    BaseProcessingInfo.validate_num_items = validate_num_items
