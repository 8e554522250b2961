"""Loads a model from a local directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import dequantize_model, load_model

from metal_models import interception, registry
from metal_models.checkpoint import check_files, read_config
from metal_models.errors import CheckpointError, MetalModelsError
from metal_models.model import PagedModel
from metal_models.pooling_checkpoint import for_pooling


def load(
    path: str | Path,
    *,
    dtype: mx.Dtype | None = None,
    expand_to_bytes: int = 0,
    pooling: bool = False,
    mla_kernel: bool = True,
) -> PagedModel:
    """Load a model and evaluate its parameters.

    Args:
        path: A directory in mlx-lm's or Hugging Face's safetensors form (quantised ones
            included), a directory that holds one ``.gguf``, or a ``.gguf`` file.
        dtype: Type to cast floating-point parameters to; by default they stay as stored.
        mla_kernel: Whether latent attention may use the GPU kernel.
        expand_to_bytes: Hold quantised weights as floats if all weights then take no more than this. For MLX's
            CPU backend, whose quantized matmul is a scalar loop.
        pooling: Whether the checkpoint may be that of a model that embeds or classifies: see ``for_pooling``.

    Raises:
        UnsupportedModelError: The architecture does not page (known before weights are read).
        CheckpointError: A file is missing or damaged, or a tensor is missing, too many or misshapen.
    """
    path = Path(path)
    module, config = _load_gguf(path, dtype) if _is_gguf(path) else _load_safetensors(path, dtype, pooling)
    if _expanded_nbytes(module) <= expand_to_bytes:
        mx.eval(dequantize_model(module).parameters())
    return PagedModel(module, config, mla_kernel=mla_kernel)


def _expanded_nbytes(module: nn.Module) -> int:
    """Return the bytes of all weights once the quantised ones are held in the dtype of their scales."""
    nbytes = 0
    for _, layer in module.named_modules():
        own = {name: array for name, array in layer.items() if isinstance(array, mx.array)}
        if "scales" in own:
            values = own["weight"].size * 32 // layer.bits
            nbytes += values * own["scales"].dtype.size
        nbytes += sum(array.nbytes for name, array in own.items() if "scales" not in own or name == "bias")
    return nbytes


def _is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf":
        return True
    return not any(path.glob("model*.safetensors")) and len(list(path.glob("*.gguf"))) == 1


def _load_gguf(path: Path, dtype: mx.Dtype | None) -> tuple[nn.Module, dict[str, Any]]:
    from metal_models.gguf import load_gguf

    interception.install()
    loaded: tuple[nn.Module, dict[str, Any]] = load_gguf(path, dtype=dtype)
    return loaded


def _load_safetensors(path: Path, dtype: mx.Dtype | None, pooling: bool) -> tuple[nn.Module, dict[str, Any]]:
    config = read_config(path)
    if "model_file" in config:
        raise MetalModelsError(
            f"[load] expected one of mlx-lm's architectures, got code of the model's own "
            f"({config['model_file']}) in {path}, which is not run. Use a checkpoint without it."
        )
    registry.supported(config)
    check_files(path)
    try:
        module, config = load_model(path, lazy=True, strict=True, get_model_classes=_classes(pooling))
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"[load] expected tensors that fit {config['model_type']!r} in {path}, got: {_summary(error)}. "
            "Check that the files belong together, or download them again."
        ) from error
    if dtype is not None:
        _cast(module, dtype)
    mx.eval(module.parameters())
    return module, config


def _classes(pooling: bool) -> Callable[[dict[str, Any]], tuple[type[nn.Module], type[Any]]]:
    if not pooling:
        return registry.model_classes

    def pooling_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
        model_class, args_class = registry.model_classes(config)
        return for_pooling(model_class), args_class

    return pooling_classes


def _cast(module: nn.Module, dtype: mx.Dtype) -> None:
    """Cast floating-point parameters, except those that the architecture wants as they are."""
    wanted = getattr(module, "cast_predicate", lambda name: True)

    def cast(name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if floating and wanted(name) else array

    module.update(tree_map_with_path(cast, module.parameters()))


def _summary(error: Exception) -> str:
    """Put mlx's list of tensors on one line, and name the missing key of a bare KeyError."""
    if isinstance(error, KeyError):
        return f"no tensor {error.args[0]!r}"
    lines = [line.strip().rstrip(",.") for line in str(error).splitlines() if line.strip()]
    shown = ", ".join(lines[:4]).replace(":,", ":")
    return f"{shown} and {len(lines) - 4} more" if len(lines) > 4 else shown
