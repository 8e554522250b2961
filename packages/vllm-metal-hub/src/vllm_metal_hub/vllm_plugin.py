"""What every vLLM process does with this package: model references become local snapshots."""

import os
from pathlib import Path
from typing import Any

from vllm_metal_hub.errors import HubError
from vllm_metal_hub.settings import VARIABLES
from vllm_metal_hub.vllm_paths import local_path, resolved

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
    from_cli_args = arg_utils.EngineArgs.from_cli_args.__func__

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(self)
        return create_engine_config(self, *args, **kwargs)

    def from_arguments(cls: Any, args: Any) -> Any:
        prepare_lora_modules(args)
        return from_cli_args(cls, args)

    arg_utils.EngineArgs.create_engine_config = create
    arg_utils.EngineArgs.from_cli_args = classmethod(from_arguments)
    # Under HF_HUB_OFFLINE vLLM looks references up when its arguments are made, in one cache, and forgets the name
    # that was typed. Ours are resolved with every other launch, in create.
    arg_utils.get_model_path = _as_typed


def prepare(engine_args: Any) -> None:
    """Replace the references of a launch beside the model itself, and bring the code that any of them takes along.

    These are tokenizer, configuration, generation configuration, draft model and multimodal adapters; with
    ``trust_remote_code`` also the model, when its code is in another repository. A local path stays, and a second call
    changes nothing.
    """
    revision = engine_args.revision
    if engine_args.trust_remote_code:
        _bring_code(engine_args)
    if engine_args.tokenizer not in (None, engine_args.model):
        tokenizer_revision = engine_args.tokenizer_revision or revision
        engine_args.tokenizer = _place(engine_args, engine_args.tokenizer, tokenizer_revision, small=True)
    if engine_args.hf_config_path:
        engine_args.hf_config_path = _place(engine_args, engine_args.hf_config_path, revision, small=True)
    if engine_args.generation_config not in ("auto", "vllm", None):
        engine_args.generation_config = _local(engine_args.generation_config, None, small=True)
    draft = engine_args.speculative_config
    if isinstance(draft, dict) and "/" in str(draft.get("model") or ""):
        path = _place(engine_args, draft["model"], draft.get("revision"))
        engine_args.speculative_config = {**draft, "model": path}
    adapters = engine_args.default_mm_loras
    if adapters:
        engine_args.default_mm_loras = {kind: _local(text, None) for kind, text in adapters.items()}
    if engine_args.enable_lora:
        from vllm_metal_hub import vllm_lora

        vllm_lora.install()


def prepare_lora_modules(args: Any) -> None:
    """Replace the references in ``--lora-modules`` of a command line; paths stay, and so do the names."""
    for module in getattr(args, "lora_modules", None) or ():
        module.path = _local(module.path, None)


def _bring_code(engine_args: Any) -> None:
    typed = engine_args.model
    found = _local(typed, engine_args.revision)
    path = _with_code(found, engine_args.code_revision)
    if path == found:
        return
    engine_args.served_model_name = engine_args.served_model_name or [typed]
    engine_args.model = path
    if engine_args.tokenizer == typed:
        engine_args.tokenizer = path


def _place(engine_args: Any, reference: str, revision: str | None, *, small: bool = False) -> str:
    path = _local(reference, revision, small=small)
    return _with_code(path, engine_args.code_revision) if engine_args.trust_remote_code else path


def _with_code(path: str, code_revision: str | None) -> str:
    from vllm_metal_hub.remote_code import with_code
    from vllm_metal_hub.settings import HubSettings
    from vllm_metal_plugin.errors import ModelFilesError

    if not os.path.isdir(path):
        return path
    root = HubSettings.from_env().with_code
    try:
        return str(with_code(Path(path), lambda repo: resolved(repo, code_revision, "small").path, root))
    except HubError as error:
        raise ModelFilesError(str(error)) from error


def _local(reference: str, revision: str | None, *, small: bool = False) -> str:
    return reference if os.path.exists(reference) else local_path(reference, revision, small=small) or reference


def _as_typed(model: str, revision: str | None = None) -> str:
    return model


def _reader(name: str) -> Any:
    return lambda: os.environ.get(name)
