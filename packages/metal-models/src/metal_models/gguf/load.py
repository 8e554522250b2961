"""A GGUF file as one of mlx-lm's models, quantised where the file is."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Int64
from mlx.utils import tree_flatten

from metal_models.errors import CheckpointError, MetalModelsError
from metal_models.gguf.architectures import Architecture, architecture_of
from metal_models.gguf.blocks import AFFINE_FORMATS, GROUP_SIZE
from metal_models.gguf.config import config_of, default_dtype, open_gguf
from metal_models.gguf.file import GGUFFile
from metal_models.gguf.tensors import read_dense, read_quantized
from metal_models.registry import build

logger = logging.getLogger(__name__)

_DTYPE_NAMES = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float32"}
# Read into the config, not into a module.
_CONFIG_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def load_gguf(path: str | Path, dtype: mx.Dtype | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Load a GGUF file into mlx-lm's model for its architecture.

    Matrices of the types in ``AFFINE_FORMATS`` stay quantised, in MLX's affine form; other quantised types
    are expanded, with one warning. The weights are evaluated, one tensor at a time.

    Args:
        path: A .gguf file, or a directory with one.
        dtype: Of activations, scales and unquantised weights; by default what fits the file.

    Returns:
        The model, and its config in the form of config.json, with mlx-lm's ``quantization`` entry.

    Raises:
        CheckpointError: A damaged file, or tensors that are missing, superfluous or misshapen; the message
            names the tensor.
        UnsupportedModelError: An architecture, a tensor type or a kind of RoPE scaling that is not known.
    """
    file = open_gguf(path)
    architecture = architecture_of(file)
    config = config_of(file)
    dtype = default_dtype(file, architecture) if dtype is None else dtype
    if dtype not in _DTYPE_NAMES:
        raise MetalModelsError(f"[load_gguf] expected float16, bfloat16 or float32, got {dtype}.")
    config["torch_dtype"] = _DTYPE_NAMES[dtype]
    model = build(config)
    places = {name: _place(file, name, architecture) for name in file.tensors if name not in _CONFIG_TENSORS}
    if hasattr(model, "sanitize"):
        # Some models drop a tied output layer only when they see that no file has it.
        model.sanitize(dict.fromkeys(places.values()))
    _check(file, model, places, architecture)
    formats = _formats(file, model, places)
    if formats:
        nn.quantize(model, class_predicate=lambda path, _: formats.get(path, False))
        config["quantization"] = _quantization(formats)
    _warn_expanded(file, places, formats)
    weights: list[tuple[str, mx.array]] = []
    for name, target in places.items():
        read = _read(file, name, architecture, config, dtype, quantized=target.rpartition(".")[0] in formats)
        mx.eval(list(read.values()))
        weights += [(target.removesuffix("weight") + part, value) for part, value in read.items()]
    model.load_weights(weights, strict=True)
    model.eval()
    return model, config


def _place(file: GGUFFile, name: str, architecture: Architecture) -> str:
    """Return the parameter that a tensor is for."""
    stem, _, suffix = name.rpartition(".")
    module = architecture.module_of(stem)
    if module is None or suffix not in ("weight", "bias"):
        raise CheckpointError(
            f"[load_gguf] expected tensors of {architecture.model_type}, got {name!r} in {file.path}. "
            "Convert the model again with a current llama.cpp."
        )
    return f"{module}.{suffix}"


def _check(file: GGUFFile, model: nn.Module, places: dict[str, str], architecture: Architecture) -> None:
    """Refuse a file whose tensors are not exactly the model's parameters."""
    parameters: Any = tree_flatten(model.parameters())
    wanted = {path: value.shape for path, value in parameters}
    for name, target in places.items():
        if target not in wanted:
            raise CheckpointError(
                f"[load_gguf] expected no {target} in {architecture.model_type}, got tensor {name!r} in "
                f"{file.path}. Use the model's safetensors files."
            )
        if wanted[target] != file.tensors[name].shape:
            raise CheckpointError(
                f"[load_gguf] expected shape {wanted[target]} for {name!r}, got {file.tensors[name].shape} "
                f"in {file.path}. The metadata and the tensors disagree: download or convert the file again."
            )
    missing = sorted(set(wanted) - set(places.values()))
    if missing:
        raise CheckpointError(
            f"[load_gguf] expected a tensor for {missing[0]} (and {len(missing) - 1} more), got none in "
            f"{file.path}. Download or convert the file again."
        )


def _formats(file: GGUFFile, model: nn.Module, places: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return ``nn.quantize``'s arguments for each module that can stay quantised."""
    quantizable = {path for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    formats = {}
    for name, target in places.items():
        path, _, suffix = target.rpartition(".")
        form = AFFINE_FORMATS.get(file.tensors[name].type.name)
        if form is not None and suffix == "weight" and path in quantizable:
            formats[path] = {"group_size": GROUP_SIZE, "bits": form.bits, "mode": "affine"}
    return formats


def _quantization(formats: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return mlx-lm's ``quantization``: the commonest format, and by path those that differ."""
    bits = Counter(form["bits"] for form in formats.values()).most_common(1)[0][0]
    others = {path: form for path, form in formats.items() if form["bits"] != bits}
    return {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine", **others}


def _warn_expanded(file: GGUFFile, places: dict[str, str], formats: dict[str, dict[str, Any]]) -> None:
    kinds = Counter(
        file.tensors[name].type.name
        for name, target in places.items()
        if file.tensors[name].type.block_values > 1 and target.rpartition(".")[0] not in formats
    )
    if kinds:
        counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
        logger.warning(
            "%s: tensors that MLX cannot keep quantised take 2 bytes or more a weight: %s.",
            file.path.name,
            counts,
        )


def _read(
    file: GGUFFile,
    name: str,
    architecture: Architecture,
    config: dict[str, Any],
    dtype: mx.Dtype,
    *,
    quantized: bool,
) -> dict[str, mx.array]:
    """Read a tensor as the parts (weight, scales, biases, or bias) of its module."""
    stem, _, suffix = name.rpartition(".")
    order = _row_order(stem, architecture, config)
    if quantized and suffix == "weight":
        return dict(zip(("weight", "scales", "biases"), read_quantized(file, name, dtype, order), strict=True))
    if architecture.norm_offset and stem.endswith("_norm"):
        value = (read_dense(file, name, mx.float32) - architecture.norm_offset).astype(dtype)
    else:
        value = read_dense(file, name, dtype, order)
    return {"weight" if suffix == "weight" else "": value}


def _row_order(stem: str, architecture: Architecture, config: dict[str, Any]) -> Int64[np.ndarray, "rows"] | None:
    """Rows of q or k in mlx-lm's order: the two halves of a head, which llama.cpp interleaves."""
    part = stem.rpartition(".")[2]
    if not architecture.interleaved_rope or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    rows = np.arange(heads * config["head_dim"])
    return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
