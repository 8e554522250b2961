"""What every vLLM process does with this package: model references become local snapshots."""

import os
import sys
from typing import Any

from vllm_metal_hub.errors import HubError
from vllm_metal_hub.settings import VARIABLES

_installed = False


def register() -> None:
    """Offer our resolver to the plugin and to vLLM's own offline lookup; safe to repeat.

    The plugin resolves the model itself. Everything else that a launch names is resolved here, around it.
    """
    global _installed
    if _installed:
        return
    _installed = True
    from vllm import envs as vllm_envs
    from vllm.engine import arg_utils

    from vllm_metal_plugin import launch
    from vllm_metal_plugin.envs import read_envs
    from vllm_metal_plugin.model_path import register_resolver

    if not read_envs().use_mlx:
        return
    for name in VARIABLES:
        vllm_envs.environment_variables.setdefault(name, _reader(name))
    register_resolver(local_path)
    launch.install()  # so that ours is around the plugin's, whichever was loaded first
    create_engine_config = arg_utils.EngineArgs.create_engine_config

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(self)
        return create_engine_config(self, *args, **kwargs)

    arg_utils.EngineArgs.create_engine_config = create
    arg_utils.get_model_path = _offline_lookup(arg_utils.get_model_path)


def local_path(reference: str, revision: str | None, *, small: bool = False) -> str | None:
    """Resolve for the plugin, whose errors vLLM's front end prints without a traceback.

    ``small`` leaves out the weights. Progress goes to the error stream.

    Raises:
        ModelFilesError: with the text of the HubError behind it.
    """
    from rich.console import Console

    from vllm_metal_hub.pull_display import PullDisplay
    from vllm_metal_hub.resolver import resolve
    from vllm_metal_plugin.errors import ModelFilesError

    try:
        with PullDisplay(Console(file=sys.stderr, highlight=False), reference) as display:
            return str(resolve(reference, revision=revision, small=small, on_event=display).path)
    except HubError as error:
        raise ModelFilesError(str(error)) from error


def prepare(engine_args: Any) -> None:
    """Replace the references beside the model: tokenizer, configuration, draft model, multimodal adapters.

    Whatever is a local path already stays. A second call changes nothing.
    """
    revision = engine_args.revision
    if engine_args.tokenizer not in (None, engine_args.model):
        tokenizer_revision = engine_args.tokenizer_revision or revision
        engine_args.tokenizer = _local(engine_args.tokenizer, tokenizer_revision, small=True)
    if engine_args.hf_config_path:
        engine_args.hf_config_path = _local(engine_args.hf_config_path, revision, small=True)
    draft = engine_args.speculative_config
    if isinstance(draft, dict) and "/" in str(draft.get("model") or ""):
        path = _local(draft["model"], draft.get("revision"))
        engine_args.speculative_config = {**draft, "model": path}
    adapters = getattr(engine_args, "default_mm_loras", None)
    if adapters:
        engine_args.default_mm_loras = {kind: _local(text, None) for kind, text in adapters.items()}


def _local(reference: str, revision: str | None, *, small: bool = False) -> str:
    return reference if os.path.exists(reference) else local_path(reference, revision, small=small) or reference


def _reader(name: str) -> Any:
    return lambda: os.environ.get(name)


def _offline_lookup(original: Any) -> Any:
    """Replace the lookup that vLLM does under HF_HUB_OFFLINE, which knows one cache only."""

    def get_model_path(model: str, revision: str | None = None) -> Any:
        return original(model, revision) if os.path.exists(model) else local_path(model, revision)

    return get_model_path
