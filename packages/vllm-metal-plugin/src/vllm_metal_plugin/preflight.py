"""Cheap checks of a model directory before any engine process starts."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from metal_kv import KVCacheSpec, RecurrentStateSpec
from vllm_metal_plugin.errors import ModelFilesError, UnsupportedConfigError


def check_model_files(directory: str) -> None:
    """Read the configuration and the headers of the weight files, not the weights.

    Raises:
        ModelFilesError: A file is missing or truncated, or the architecture cannot be served.
    """
    from metal_models import MetalModelsError
    from metal_models.checkpoint import check_files, read_config
    from metal_models.weights import format_of

    path = Path(directory)
    try:
        encoder = not _layer_specs(directory)
        if any(path.glob("model*.safetensors")) or not any(path.glob("*.gguf")):
            check_files(path, torch_files=encoder)
            format_of(read_config(path), path)
    except MetalModelsError as error:
        raise ModelFilesError(str(error)) from error


def check_names_method(directory: str, quantization: str) -> None:
    """Refuse ``--quantization`` for weights that are not quantised: they are used as the checkpoint has them.

    Raises:
        UnsupportedConfigError: Naming the option.
    """
    from metal_models.checkpoint import read_config
    from metal_models.weights import format_of

    path = Path(directory)
    if format_of(read_config(path), path) is None:
        raise UnsupportedConfigError(
            f"[config] expected no --quantization with this model, got {quantization}. Weights are used as the "
            "checkpoint has them: drop the option, or choose a quantised checkpoint."
        )


def keeps_states(directory: str) -> bool:
    """Whether some layer of the model carries a recurrent state from token to token."""
    return any(isinstance(spec, RecurrentStateSpec) for spec in _layer_specs(directory).values())


@cache
def _layer_specs(directory: str) -> Mapping[str, KVCacheSpec]:
    from metal_models.checkpoint import read_config
    from metal_models.registry import layer_specs

    return layer_specs(read_config(Path(directory)))
