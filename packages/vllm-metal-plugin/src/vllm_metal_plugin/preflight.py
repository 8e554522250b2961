"""Cheap checks of a model directory before any engine process starts."""

from pathlib import Path

from vllm_metal_plugin.errors import ModelFilesError


def check_model_files(directory: str) -> None:
    """Read the configuration and the headers of the weight files, not the weights.

    Raises:
        ModelFilesError: A file is missing or truncated, or the architecture cannot be served.
    """
    from metal_models import MetalModelsError, supported
    from metal_models.checkpoint import check_files, read_config

    path = Path(directory)
    try:
        supported(read_config(path))
        if any(path.glob("model*.safetensors")) or not any(path.glob("*.gguf")):
            check_files(path)
    except MetalModelsError as error:
        raise ModelFilesError(str(error)) from error
