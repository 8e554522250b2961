"""Makes mlx-vlm's models, for their towers."""

import copy
import importlib
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_models.config_names import with_old_names
from metal_models.errors import MetalModelsError


def installed() -> bool:
    """Whether mlx-vlm is there; it is not imported."""
    return importlib.util.find_spec("mlx_vlm") is not None


@dataclass(frozen=True, eq=False)
class VlmModel:
    """One of mlx-vlm's models, with random, unevaluated parameters: it takes time for its modules but no memory.

    Attributes:
        module: The model.
    """

    module: Any

    def parts(self, names: Iterable[str]) -> nn.Module:
        """Return a module of nothing but some of the model's modules and arrays; those that it lacks are left out."""
        kept = nn.Module()
        for name in names:
            if name in self.module:
                setattr(kept, name, self.module[name])
        return kept

    def sanitize(self, weights: dict[str, mx.array], renamers: Iterable[str]) -> dict[str, mx.array]:
        """Return the tensors of a checkpoint under the names and in the layouts of the model's towers, lazily.

        Args:
            weights: As stored.
            renamers: As in ``Towers``.
        """
        for name in renamers:
            weights = (self.module[name] if name else self.module).sanitize(weights)
        return weights


def build(package_name: str, config: dict[str, Any], sub_configs: Iterable[str] = ("text", "vision")) -> VlmModel:
    """Make the model of ``mlx_vlm.models.<package_name>``.

    Args:
        package_name: The package.
        config: As in ``config.json``.
        sub_configs: Which configs in it have a class of their own; one that is None has not.

    Raises:
        MetalModelsError: mlx-vlm is not installed, or the config lacks a value.
    """
    package = _import(package_name)
    config = _as_before(copy.deepcopy(config))
    try:
        made = {
            f"{kind}_config": getattr(package, f"{kind.title()}Config").from_dict(config[f"{kind}_config"])
            for kind in sub_configs
            if config[f"{kind}_config"] is not None
        }
        model_config = package.config.ModelConfig.from_dict(config | made)
        for name, own in made.items():
            setattr(model_config, name, own)
        return VlmModel(package.Model(model_config))
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise MetalModelsError(
            f"[towers] expected a complete config for {config.get('model_type')!r}, got {type(error).__name__}: "
            f"{error}. Check the model's config.json."
        ) from error


def _as_before(config: dict[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` with all that mlx-vlm's config classes look for, in all places where they look."""
    config = with_old_names(config)
    text = config.pop("llm_config", None) or config.get("text_config") or {}
    return {"vision_config": {}, "audio_config": {}, **text, **config, "text_config": text}


def _import(name: str) -> Any:
    """Import ``mlx_vlm.models.<name>``.

    Its packages replace ``AutoProcessor.from_pretrained`` of transformers with one that returns their own processors,
    and methods of transformers' processors, and silence transformers by environment variables; whatever else runs in
    the process, or is started by it, expects transformers' own, so that is undone.
    """
    if not installed():
        raise MetalModelsError(
            "[towers] expected mlx-vlm, which has the vision and audio encoders, got an environment without it. "
            "Install metal-models[multimodal] (or vllm-metal[multimodal])."
        )
    own = {owner: _attributes(owner) for owner in _processor_classes(name)}
    environment = dict(os.environ)
    try:
        return importlib.import_module(f"mlx_vlm.models.{name}")
    finally:
        for owner, attributes in own.items():
            _restore(owner, attributes)
        for variable in set(os.environ) - set(environment):
            del os.environ[variable]
        os.environ.update(environment)


def _processor_classes(name: str) -> list[type]:
    """Return transformers' classes that an import of mlx-vlm's package of some name may change."""
    from transformers import AutoProcessor

    module = f"transformers.models.{name}.processing_{name}"
    try:
        found = vars(importlib.import_module(module)).values()
    except ImportError:
        found = {}.values()
    return [AutoProcessor, *(owner for owner in found if isinstance(owner, type) and owner.__module__ == module)]


def _attributes(owner: type) -> dict[str, Any]:
    """Return what a class has of its own; of defaults that it keeps in dictionaries, copies."""
    return {name: copy.deepcopy(value) if name == "_defaults" else value for name, value in vars(owner).items()}


def _restore(owner: type, attributes: dict[str, Any]) -> None:
    """Let a class have nothing but ``attributes`` of its own."""
    for name in set(vars(owner)) - set(attributes):
        delattr(owner, name)
    for name, value in attributes.items():
        if vars(owner)[name] is not value:
            setattr(owner, name, value)
