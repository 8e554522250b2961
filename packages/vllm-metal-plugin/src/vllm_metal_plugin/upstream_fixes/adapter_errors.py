"""vLLM 0.32 and 0.33 answer HTTP 500 to a request to load an adapter that is damaged, too large or for another model.

The front end has only the text of the worker's error, and takes all but a missing directory for a fault of the server.
It can go when ``OpenAIServingModels.load_lora_adapter`` tells client errors of ``add_lora`` apart.
"""

import sys
from http import HTTPStatus
from typing import Any

_MODULE = "vllm.entrypoints.openai.models.serving"
_OURS = "[lora] "
"""How texts of errors about adapters begin."""


def install() -> None:
    """Answer 400 with the reason, in a process that serves HTTP; safe to repeat."""
    module = sys.modules.get(_MODULE)
    if module is None or hasattr(module.OpenAIServingModels.load_lora_adapter, "__wrapped__"):
        return
    original = module.OpenAIServingModels.load_lora_adapter

    async def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await original(self, *args, **kwargs)
        error = getattr(answer, "error", None)
        if error is not None and error.code == HTTPStatus.INTERNAL_SERVER_ERROR and _OURS in error.message:
            error.code, error.type = HTTPStatus.BAD_REQUEST.value, "BadRequestError"
            error.message = error.message[error.message.index(_OURS) :]
        return answer

    load_lora_adapter.__wrapped__ = original  # type: ignore[attr-defined]
    module.OpenAIServingModels.load_lora_adapter = load_lora_adapter
