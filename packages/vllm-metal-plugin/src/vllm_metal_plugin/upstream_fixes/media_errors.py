"""vLLM 0.32 answers HTTP 500, and ends the connection, where an image's address leads nowhere or must not be read.

So it does with a host that does not answer, a local file without ``--allowed-local-media-path``, a data URL that is
not base64, and files whose decoder raises something else than ``ValueError``. Can go when ``MediaConnector`` raises
errors of the client in these cases.
"""

from functools import wraps
from typing import Any

_SHOWN = 100
"""Characters of an address that a message repeats: data URLs are long."""
_installed = False


def install() -> None:
    """Let whatever fails while an image, video or sound is loaded be the client's fault; safe to repeat."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.multimodal.media.connector import MediaConnector

    load, load_async = MediaConnector.load_from_url, MediaConnector.load_from_url_async

    @wraps(load)
    def load_from_url(self: Any, url: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, url, *args, **kwargs)
        except Exception as error:
            raise _of_client(error, url) from error

    @wraps(load_async)
    async def load_from_url_async(self: Any, url: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await load_async(self, url, *args, **kwargs)
        except Exception as error:
            raise _of_client(error, url) from error

    MediaConnector.load_from_url = load_from_url
    MediaConnector.load_from_url_async = load_from_url_async


def _of_client(error: Exception, url: str) -> Exception:
    from vllm.exceptions import VLLMClientError, VLLMValidationError

    if isinstance(error, (VLLMClientError, ValueError)):
        return error
    shown = url if len(url) <= _SHOWN else f"{url[:_SHOWN]}…"
    refusal: Exception = VLLMValidationError(f"Failed to load {shown}: {str(error) or type(error).__name__}")
    return refusal
