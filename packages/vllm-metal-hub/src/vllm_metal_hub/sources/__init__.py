"""The two hubs, each behind the same three questions."""

from vllm_metal_hub.model_ref import Source
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.sources.base import Hub, Listing, TransientError

__all__ = ["Hub", "Listing", "TransientError", "open_hub"]


def open_hub(source: Source, settings: HubSettings) -> Hub:
    """Return the client of one hub; imports its library, so only the fetching process calls this."""
    if source == "huggingface":
        from vllm_metal_hub.sources.huggingface import HuggingFace

        return HuggingFace(settings)
    from vllm_metal_hub.sources.modelscope import ModelScope

    return ModelScope(settings)
