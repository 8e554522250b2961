"""How much memory weights take once they are loaded, which is not always what their files do."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_metal_hub.errors import HubError

if TYPE_CHECKING:
    import mlx.core as mx


def held_bytes(
    directory: Path, config: dict[str, Any], stored_bytes: int, *, dtype: "mx.Dtype", expand_to_bytes: int = 0
) -> int:
    """Return what the server's weights take: exactly for files that are here, else by the model's configuration.

    Formats that MLX does not have are converted while they are loaded, floats may be cast, and on a CPU quantised
    weights become floats.

    Args:
        directory: A snapshot, with or without weights.
        config: Its ``config.json``.
        stored_bytes: Size of the weights' files.
        dtype: What the server computes in.
        expand_to_bytes: See ``metal_models.load``.

    Raises:
        HubError: The model cannot be loaded.
    """
    from metal_models import CheckpointError, MetalModelsError
    from metal_models.capacity import converted_weight_bytes
    from metal_models.encoders import is_encoder
    from metal_models.loader import weight_bytes
    from metal_models.multimodal.load import has_towers

    if is_encoder(config):
        return stored_bytes
    try:
        if any(directory.glob("model*.safetensors")) and not has_towers(config):
            with suppress(CheckpointError):  # not all files are here yet
                return weight_bytes(directory, dtype=dtype, expand_to_bytes=expand_to_bytes)
        converted = converted_weight_bytes(config, dtype=dtype)
    except MetalModelsError as error:
        raise HubError(str(error)) from error
    return stored_bytes if converted is None else converted
