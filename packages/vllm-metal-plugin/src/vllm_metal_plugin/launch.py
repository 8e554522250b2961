"""What happens to vLLM's engine arguments before a configuration is built from them."""

import sys
import traceback
from types import TracebackType
from typing import Any

from vllm_metal_plugin import upstream_fixes
from vllm_metal_plugin.errors import UnsupportedConfigError, VllmMetalPluginError

_installed = False
_prints_own_errors = False
_REFUSED = "[config] vLLM refuses these options:"
_SERVE = "vllm/entrypoints/cli/serve.py"
_OPTION_CHECKS = {"validate_parsed_serve_args", "validate_api_server_args", "get_reasoning_parser"}
"""Functions of vLLM that raise for options of its command line."""


def install() -> None:
    """Wrap ``EngineArgs`` so that every launch resolves and checks its model first; safe to repeat."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.engine.arg_utils import EngineArgs

    from vllm_metal_plugin import plain_config

    plain_config.install()
    create_engine_config = EngineArgs.create_engine_config
    get_batch_defaults = EngineArgs.get_batch_defaults.__func__

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        from pydantic import ValidationError

        from vllm_metal_plugin import quantization

        upstream_fixes.install_in_front_end()
        quantization.register()
        prepare(self)
        try:
            return create_engine_config(self, *args, **kwargs)
        except ValidationError as error:
            reasons = dict.fromkeys(_reason(fault) for fault in error.errors())
            raise UnsupportedConfigError(f"{_REFUSED} {'; '.join(reasons)}") from error

    def batch_defaults(cls: Any, world_size: int) -> tuple[dict[Any, int], dict[Any, int]]:
        return smaller_batch_defaults(*get_batch_defaults(cls, world_size))

    EngineArgs.create_engine_config = create
    EngineArgs.get_batch_defaults = classmethod(batch_defaults)


def _reason(fault: Any) -> str:
    """One fault that pydantic found; where vLLM checks a value itself, its text names the option."""
    text: str = fault["msg"]
    if text.startswith("Value error, ") or not fault["loc"]:
        return text.removeprefix("Value error, ")
    return f"{fault['loc'][0]}: {text}, got {fault['input']!r}"


def prepare(engine_args: Any) -> None:
    """Replace model references by local paths and check the files; a second call changes nothing.

    Raises:
        VllmMetalPluginError: The model cannot be served; the text is for the user.
    """
    from vllm_metal_plugin.model_path import resolve
    from vllm_metal_plugin.preflight import check_model_files, check_names_method

    typed = engine_args.model
    path = resolve(typed, engine_args.revision)
    if path != typed:
        engine_args.served_model_name = engine_args.served_model_name or [typed]
        engine_args.model = path
    tokenizer = engine_args.tokenizer
    if tokenizer is not None:
        engine_args.tokenizer = (
            path if tokenizer == typed else resolve(tokenizer, engine_args.tokenizer_revision or engine_args.revision)
        )
    backend = engine_args.attention_backend
    if backend is not None:  # not in the finished configuration, where vLLM chooses one for some models
        name = getattr(backend, "name", backend)
        raise UnsupportedConfigError(f"[config] expected no --attention-backend, got {name}. MLX has one: drop it.")
    check_model_files(path)
    if engine_args.quantization is not None:
        check_names_method(path, str(engine_args.quantization))
    choose_modalities(engine_args, path)


def choose_modalities(engine_args: Any, directory: str) -> None:
    """Tell vLLM what prompts may hold beside text: the rest it refuses with HTTP 400 and plans no memory for.

    Raises:
        UnsupportedConfigError: The model has a vision or audio part that cannot be served.
    """
    from vllm_metal_plugin.envs import read_envs
    from vllm_metal_plugin.log import metal_logger
    from vllm_metal_plugin.multimodal.mode import limits, serving
    from vllm_metal_plugin.upstream_fixes import text_only_reason

    if engine_args.language_model_only:
        return
    asked = limits(engine_args.limit_mm_per_prompt or {})
    served = serving(directory, read_envs(), asked)
    if served.reason is not None:
        metal_logger(__name__).info("Serving the language model alone: %s", served.reason)
        engine_args.language_model_only = True
        text_only_reason.install(served.reason)
    elif served.modalities:
        engine_args.limit_mm_per_prompt = limits(asked, served.modalities)


def smaller_batch_defaults(tokens: dict[Any, int], seqs: dict[Any, int]) -> tuple[dict[Any, int], dict[Any, int]]:
    """Cap vLLM's defaults, which it derives from memory size as if the device were a data-centre GPU.

    On a Mac or a CPU a step of 2,048 prompt tokens already takes long enough to fill the device.
    """
    from vllm_metal_plugin.device import select_device

    max_tokens, max_seqs = {"metal": (2048, 256), "cuda": (8192, 512), "cpu": (1024, 128)}[select_device()]
    return (
        {context: min(count, max_tokens) for context, count in tokens.items()},
        {context: min(count, max_seqs) for context, count in seqs.items()},
    )


def message_for_users(error: BaseException, trace: TracebackType | None) -> str | None:
    """The sentence that ends a launch; None where only a traceback says what went wrong."""
    if isinstance(error, VllmMetalPluginError):
        return str(error)
    code = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    places = {function.co_name for function in code}
    if isinstance(error, KeyboardInterrupt) and any(function.co_filename.endswith(_SERVE) for function in code):
        return "[server] stopped before it was ready."
    if "create_server_socket" in places:
        got = str(error).removesuffix(".")
        return f"[server] expected an address that is free, got: {got}. Choose another --port or --host."
    if places & _OPTION_CHECKS:
        return f"{_REFUSED} {str(error.args[0] if error.args else error).removeprefix('Error: ')}"
    return None


def print_own_errors() -> None:
    """Let an error that is meant for users end the process with its message alone; safe to repeat."""
    global _prints_own_errors
    if _prints_own_errors:
        return
    _prints_own_errors = True
    hook = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = message_for_users(error, trace)
        if message is None:
            hook(kind, error, trace)
        else:
            print(f"error: {message}", file=sys.stderr)

    sys.excepthook = excepthook
