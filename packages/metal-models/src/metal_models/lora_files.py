"""Reads LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from metal_models.errors import AdapterError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

# Settings that change what an adapter computes and that are not supported -> values that change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}

# Initialisations that leave the base weights as they are; others subtract something from them.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "lora_ga")


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to one linear layer.

    Attributes:
        a: ``[input, rank]``.
        b: ``[rank, output]``, times the adapter's scale.
    """

    a: mx.array
    b: mx.array


@dataclass(frozen=True)
class PeftConfig:
    """The settings of an adapter that say what it computes."""

    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str] | str | None
    all_layers: bool

    def rank_of(self, module: str) -> int:
        """Return the rank at a module."""
        return int(_match(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return the factor of the product of both matrices at a module."""
        rank = self.rank_of(module)
        alpha = float(_match(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT would have adapted a module of this name; False where that is not known."""
        if not self.all_layers or self.target_modules is None or self.target_modules == "all-linear":
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.target_modules)


def read_config(directory: Path) -> PeftConfig:
    """Read and check an adapter's settings.

    Raises:
        AdapterError: They are missing, damaged, or ask for something that is not supported.
    """
    path = directory / _CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise AdapterError(
            f"[lora] expected {_CONFIG} in {directory}, got none. Give a PEFT adapter's path."
        ) from error
    except ValueError as error:
        raise AdapterError(f"[lora] expected JSON in {path}, got {error}. Download it again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"[lora] expected peft_type LORA in {path}, got {kind}. Use a LoRA adapter.")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise AdapterError(f"[lora] expected an adapter without {name}, got {config[name]!r} in {path}. Merge it.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise AdapterError(
            f"[lora] expected an adapter to the model's own weights, got init_lora_weights {init!r} in {path}, which "
            "changes them. Convert it with PEFT's path_initial_model_for_weight_conversion."
        )
    return _settings(config, path)


def _settings(config: dict[str, Any], path: Path) -> PeftConfig:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise AdapterError(f"[lora] expected r and lora_alpha in {path}, got {rank!r} and {alpha!r}. Check the file.")
    narrowed = ("layers_to_transform", "exclude_modules")
    return PeftConfig(
        rank=rank,
        alpha=float(alpha),
        rank_stabilised=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
        target_modules=config.get("target_modules"),
        all_layers=not any(config.get(name) for name in narrowed),
    )


def read_tensors(directory: Path) -> dict[str, dict[str, mx.array]]:
    """Return an adapter's two matrices, ``A`` and ``B``, by the name of the module they are for.

    Raises:
        AdapterError: The file is missing or damaged, or a tensor is missing or of another kind.
    """
    path = directory / _WEIGHTS
    if not path.is_file():
        raise AdapterError(f"[lora] expected {_WEIGHTS} in {directory}, got none. Save the adapter as safetensors.")
    try:
        tensors: Any = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"[lora] expected safetensors in {path}, got: {error}. Download it again.") from error
    modules: dict[str, dict[str, mx.array]] = {}
    for name, array in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"[lora] expected tensors named …lora_A.weight and …lora_B.weight, got {name} in {path}."
            )
        modules.setdefault(match["module"].removeprefix(_PREFIX), {})[match["part"]] = array
    for module, parts in modules.items():
        for part in {"A", "B"} - parts.keys():
            raise AdapterError(f"[lora] expected a tensor {module}.lora_{part}.weight in {path}, got none.")
    return modules


def check_complete(config: PeftConfig, given: Collection[str], known: Iterable[str], directory: Path) -> None:
    """Check that an adapter has tensors for every module that its settings name.

    Args:
        config: The settings.
        given: Modules that have tensors.
        known: All modules of the model that may be adapted.
        directory: Where the adapter is.

    Raises:
        AdapterError: Naming the first that has none.
    """
    for module in known:
        if config.targets(module) and module not in given:
            raise AdapterError(
                f"[lora] expected a tensor {module}.lora_A.weight in {directory / _WEIGHTS}, which target_modules "
                "name, got none. Check that the files belong together."
            )


def _match(pattern: dict[str, Any], module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that is the end of a module's name, as PEFT does."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
