"""What every vLLM process does with this package: model references become local snapshots."""

import os
from typing import Any

from vllm_metal_hub.errors import HubError
from vllm_metal_hub.settings import VARIABLES

_installed = False


def register() -> None:
    """Offer our resolver to the plugin, and to vLLM's own offline lookup; safe to repeat."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm import envs as vllm_envs
    from vllm.engine import arg_utils

    from vllm_metal_plugin.model_path import register_resolver

    for name in VARIABLES:
        vllm_envs.environment_variables.setdefault(name, _reader(name))
    register_resolver(local_path)
    arg_utils.get_model_path = _offline_lookup(arg_utils.get_model_path)


def local_path(reference: str, revision: str | None) -> str | None:
    """Resolve for the plugin, whose errors vLLM's front end prints without a traceback.

    Raises:
        ModelFilesError: with the text of the HubError behind it.
    """
    from vllm_metal_hub.resolver import resolve
    from vllm_metal_plugin.errors import ModelFilesError

    try:
        return str(resolve(reference, revision=revision).path)
    except HubError as error:
        raise ModelFilesError(str(error)) from error


def _reader(name: str) -> Any:
    return lambda: os.environ.get(name)


def _offline_lookup(original: Any) -> Any:
    """Replace the lookup that vLLM does under HF_HUB_OFFLINE, which knows one cache only."""

    def get_model_path(model: str, revision: str | None = None) -> Any:
        if os.path.exists(model):
            return original(model, revision)
        return local_path(model, revision)

    return get_model_path
