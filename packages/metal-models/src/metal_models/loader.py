"""Loads a model from a local directory."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import load_model

from metal_models import interception, registry
from metal_models.checkpoint import check_files, read_config
from metal_models.errors import CheckpointError, MetalModelsError
from metal_models.factored_linear import multiply_by
from metal_models.model import PagedModel
from metal_models.pooling_checkpoint import for_pooling
from metal_models.residence import embed_in, evaluate, expand, expanded_nbytes, nbytes
from metal_models.weights import (
    CheckpointFormat,
    Conversion,
    config_dtype,
    converting,
    format_of,
    own_quantization,
    quantization_of,
)

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    dtype: mx.Dtype | None = None,
    expand_to_bytes: int = 0,
    pooling: bool = False,
    mla_kernel: bool = True,
    gdn_kernel: bool = True,
    compiled_decode: bool | None = None,
) -> PagedModel:
    """Load a model and evaluate its parameters.

    Args:
        path: A directory in mlx-lm's or Hugging Face's safetensors form (quantised ones
            included), a directory that holds one ``.gguf``, or a ``.gguf`` file.
        dtype: Type to cast floating-point parameters to; by default they stay as stored.
        mla_kernel: Whether latent attention may use the GPU kernel.
        gdn_kernel: Whether decode steps of gated delta nets may use the GPU kernel.
        compiled_decode: See :class:`PagedModel`.
        expand_to_bytes: Hold quantised weights as floats if all weights then take no more than this. For MLX's
            CPU backend, whose quantized matmul is a scalar loop.
        pooling: Whether the checkpoint may be that of a model that embeds or classifies: see ``for_pooling``.

    Raises:
        UnsupportedModelError: The architecture does not page (known before weights are read).
        CheckpointError: A file is missing or damaged, or a tensor is missing, too many or misshapen.
    """
    path = Path(path)
    module, config = _lazily(path, dtype, pooling)
    evaluate(module)
    if expanded_nbytes(module, dtype) <= expand_to_bytes:
        expand(module, dtype)
    if dtype is not None:
        embed_in(module, dtype)
    return PagedModel(module, config, mla_kernel=mla_kernel, gdn_kernel=gdn_kernel, compiled_decode=compiled_decode)


def weight_bytes(
    path: str | Path, *, dtype: mx.Dtype | None = None, expand_to_bytes: int = 0, pooling: bool = False
) -> int:
    """Return what ``load`` with these arguments would take, from the headers of the files; weights are not read.

    Raises:
        MetalModelsError: As ``load``.
    """
    module, _ = _lazily(Path(path), dtype, pooling)
    expanded = expanded_nbytes(module, dtype)
    return expanded if expanded <= expand_to_bytes else nbytes(module)


def _lazily(path: Path, dtype: mx.Dtype | None, pooling: bool) -> tuple[nn.Module, dict[str, Any]]:
    return _load_gguf(path, dtype) if _is_gguf(path) else _load_safetensors(path, dtype, pooling)


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
    form = format_of(config, path)
    check_files(path)
    if form is None:
        module, config = _attempt(path, config, pooling, None)
    else:
        module, config = _convert(path, config, pooling, form, dtype or config_dtype(config))
    if dtype is not None:
        _cast(module, dtype)
    return module, config


def _convert(
    path: Path, config: dict[str, Any], pooling: bool, form: CheckpointFormat, dtype: mx.Dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Load another library's quantised weights; as floats if the model's code does not take them packed."""
    try:
        return _attempt(path, config, pooling, Conversion(form, dtype, pack=True))
    except CheckpointError as error:
        loaded = _attempt(path, config, pooling, Conversion(form, dtype, pack=False))
        logger.warning(
            "%s: weights of format %s are held as floats, which mlx-lm's code for %s needs (%s)",
            path.name, form.method, config["model_type"], error.__cause__ or error,
        )  # fmt: skip
        return loaded


def _attempt(
    path: Path, config: dict[str, Any], pooling: bool, conversion: Conversion | None
) -> tuple[nn.Module, dict[str, Any]]:
    # mlx-lm makes a layer quantised when this is there and the layer has scales, and asks these for its format.
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"} if conversion else own_quantization(config)
    try:
        module, loaded = load_model(
            path,
            lazy=True,
            strict=True,
            model_config=None if quantization is None else {"quantization": quantization},
            get_model_classes=_classes(pooling, conversion),
        )
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"[load] expected tensors that fit {config['model_type']!r} in {path}, got: {_summary(error)}. "
            "Check that the files belong together, or download them again."
        ) from error
    _check_floating(module, path)
    if conversion is not None:
        _multiply(module, conversion)
        del loaded["quantization"]
        if (found := quantization_of(module)) is not None:
            loaded["quantization"] = found
    return module, loaded


def _multiply(module: nn.Module, conversion: Conversion) -> None:
    layers: dict[str, Any] = dict(module.named_modules())
    for name, factor in conversion.factors.items():
        multiply_by(layers[name], factor)


def _check_floating(module: nn.Module, path: Path) -> None:
    """Refuse codes where the model multiplies with numbers."""
    for name, layer in module.named_modules():
        if type(layer) in (nn.Linear, nn.Embedding) and not mx.issubdtype(layer.weight.dtype, mx.floating):
            raise CheckpointError(
                f"[load] expected floating-point numbers in {name}.weight of {path}, got {layer.weight.dtype}. "
                "Its config.json must name the format of quantised weights."
            )


def _classes(
    pooling: bool, conversion: Conversion | None
) -> Callable[[dict[str, Any]], tuple[type[nn.Module], type[Any]]]:
    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
        model_class, args_class = registry.model_classes(config)
        if pooling:
            model_class = for_pooling(model_class)
        if conversion is not None:
            model_class = converting(model_class, conversion)
        return model_class, args_class

    return classes


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
