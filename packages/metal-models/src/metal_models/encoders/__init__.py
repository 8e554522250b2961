"""Models whose tokens see the whole prompt: one file for each family, named after its first ``model_type``."""

import importlib
from typing import Any

import mlx.nn as nn

from metal_models.errors import MetalModelsError, UnsupportedModelError

# ``model_type`` of a config.json -> module here, which has Model, ModelArgs and their rules for names of tensors.
FAMILIES = {
    "bert": "bert",
    "modernbert": "modernbert",
    "roberta": "bert",
    "xlm-roberta": "bert",
}


def is_encoder(config: dict[str, Any]) -> bool:
    """Whether a model of this ``config.json`` is one of these; a decoder built from the same layers is not."""
    names = config.get("architectures") or []
    causal = bool(config.get("is_decoder")) or any("CausalLM" in str(name) for name in names)
    return config.get("model_type") in FAMILIES and not causal


def family(config: dict[str, Any]) -> Any:
    """Return the module of a model's family."""
    return importlib.import_module(f"metal_models.encoders.{FAMILIES[config['model_type']]}")


def build_encoder(config: dict[str, Any]) -> nn.Module:
    """Return an encoder with random, unevaluated parameters.

    Raises:
        UnsupportedModelError: It is none of the families here.
        MetalModelsError: The config lacks a value, or has one that the family does not know.
    """
    args = _args(config)
    module: nn.Module = family(config).Model(args)
    return module


def max_length(config: dict[str, Any]) -> int:
    """Return the tokens of the longest sequence that an encoder has positions for.

    Raises:
        MetalModelsError: As ``build_encoder``.
    """
    return int(_args(config).max_length)


def _args(config: dict[str, Any]) -> Any:
    if not is_encoder(config):
        raise UnsupportedModelError(str(config.get("model_type")), "it is no encoder that is known here")
    try:
        return family(config).ModelArgs.from_dict(config)
    except (TypeError, ValueError, LookupError) as error:
        raise MetalModelsError(
            f"[load] expected a config that {config['model_type']!r} can have, got {error}. Check config.json."
        ) from error
