"""Which model class an architecture loads with, and whether it runs over the paged cache."""

import importlib
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _get_classes as mlx_lm_classes

from metal_kv.spec import KVCacheSpec
from metal_models import interception
from metal_models.adapters import wrapped_text
from metal_models.config_names import reading_new_names
from metal_models.encoders import build_encoder, is_encoder
from metal_models.errors import MetalModelsError, UnsupportedModelError
from metal_models.head_split import HeadSplit
from metal_models.layer import all_specs
from metal_models.tensor_layouts import reading_other_layouts
from metal_models.tracing import trace

# mlx-lm's model files that adapters has a module for, of the same name and with the same two names in it.
_ADAPTED = {
    "afm7",
    "baichuan_m1",
    "bitnet",
    "deepseek_v2",
    "deepseek_v32",
    "gear",
    "gemma2",
    "glm_moe_dsa",
    "gpt_bigcode",
    "kimi_vl",
    "llama4",
    "longcat_flash_ngram",
    "minicpm3",
    "minimax_m3_vl",
    "plamo",
    "plamo2",
    "stablelm",
    "youtu_llm",
}

# Architectures without a file in mlx-lm, around a language model that has one.
_WRAPPED = {
    "cohere2_vision",
    "deepseek_vl_v2",
    "dots_ocr",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "idefics3",
    "internvl",
    "internvl_chat",
    "lfm2_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_onevision",
    "minicpmv4_6",
    "paddleocr_vl",
    "qwen3_omni_moe",
    "smolvlm",
}

# ``model_type`` of a language model without the wrapper that mlx-lm's file is named after -> that file.
_UNWRAPPED = {"qwen3_5_moe_text": "qwen3_5_moe", "qwen3_5_text": "qwen3_5"}

# Families whose code would run over the paged cache but compute something else: model file -> reason.
_REFUSED = {
    "phi3small": "mlx-lm lets a token of its block-sparse layers see later ones, which no cache can repeat",
}


def model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
    """Return the classes ``(Model, ModelArgs)`` for a model's ``config.json``.

    Suits ``mlx_lm.utils.load_model(get_model_classes=…)``.

    Raises:
        UnsupportedModelError: mlx-lm has no such architecture, or it is known not to page.
    """
    architecture = architecture_of(config)
    interception.install()
    if architecture in _WRAPPED:
        return wrapped_text.Model, reading_new_names(wrapped_text.ModelArgs)
    try:
        classes: tuple[type[nn.Module], type[Any]] = mlx_lm_classes(
            {**config, "model_type": _UNWRAPPED.get(architecture, architecture)}
        )
    except ValueError as error:
        raise UnsupportedModelError(architecture, "mlx-lm has no model of that type") from error
    except SystemExit as error:  # how a model file says that it misses a package
        raise UnsupportedModelError(architecture, "its code needs a package that is not installed") from error
    file = classes[0].__module__.rpartition(".")[2]
    if file in _REFUSED:
        raise UnsupportedModelError(architecture, _REFUSED[file])
    if file not in _ADAPTED:
        return reading_other_layouts(classes[0]), reading_new_names(classes[1])
    module = importlib.import_module(f"metal_models.adapters.{file}")
    return module.Model, reading_new_names(module.ModelArgs)


def architecture_of(config: dict[str, Any]) -> str:
    """Return ``model_type``.

    Raises:
        MetalModelsError: The config names none.
    """
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or not architecture:
        raise MetalModelsError("[load] expected a model_type in config.json, got none. Check the model's files.")
    return architecture


def build(config: dict[str, Any]) -> nn.Module:
    """Return the model with random, unevaluated parameters: it takes time for its modules but no memory.

    Raises:
        UnsupportedModelError: mlx-lm's code lacks what the config asks for.
        MetalModelsError: The config lacks a value, or has one that the model refuses.
    """
    architecture = architecture_of(config)
    model_class, args_class = model_classes(config)
    make: Callable[[Any], nn.Module] = model_class
    try:
        model = make(args_class.from_dict(config))
    except MetalModelsError:
        raise
    except NotImplementedError as error:
        raise UnsupportedModelError(architecture, f"mlx-lm says {str(error).rstrip('.')!r}") from error
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise MetalModelsError(
            f"[load] expected a complete config for {architecture!r}, got {type(error).__name__}: {error}. "
            "Check the model's config.json."
        ) from error
    return model


def layer_specs(config: dict[str, Any], block_size: int = 16) -> dict[str, KVCacheSpec]:
    """Return what each layer of a model would keep, by name, without reading weights; nothing for an encoder.

    Args:
        config: As in the model's ``config.json``.
        block_size: Tokens per block.

    Raises:
        UnsupportedModelError: It does not run over the paged cache; the error names the architecture and the reason.
        MetalModelsError: The config is incomplete.
    """
    if is_encoder(config):
        build_encoder(config)
        return {}
    model = build(config)
    return all_specs(trace(model, HeadSplit(model), architecture_of(config)).layers, block_size)


def supported(config: dict[str, Any]) -> None:
    """Check that an architecture runs over the paged cache, as ``layer_specs`` does."""
    layer_specs(config)
