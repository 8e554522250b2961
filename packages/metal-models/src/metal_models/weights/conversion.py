"""Lets mlx-lm's models load quantised checkpoints of other libraries."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from metal_models.errors import CheckpointError
from metal_models.weights.formats import CheckpointFormat
from metal_models.weights.parts import Parts
from metal_models.weights.stored import Packed

Tensors = dict[str, mx.array]

# Of the scales that other engines give activations and caches, nothing is used here: both are computed as they are.
_UNUSED = (
    ".input_scale", ".input_global_scale", ".input_zero_point", ".activation_scale", "_activation_scale",
    ".output_scale", ".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".output_zero_point", ".k_zero_point",
    ".v_zero_point",
)  # fmt: skip

# Weights that mlx-lm splits by columns while loading, which packed ones cannot be.
_DENSE = (".kv_b_proj.weight",)


@dataclass(frozen=True, eq=False)
class Conversion:
    """How a checkpoint is to be loaded.

    Attributes:
        format: Of its weights.
        dtype: Of scales, and of weights as floats.
        pack: Whether weights may stay quantised.
        factors: Filled while loading: what the weights of linear layers are to be multiplied with, by name.
    """

    format: CheckpointFormat
    dtype: mx.Dtype
    pack: bool
    factors: Tensors = field(default_factory=dict)

    def __call__(self, tensors: Mapping[str, mx.array]) -> tuple[Tensors, dict[str, Packed]]:
        """Return the tensors as floats, and the weights that stay quantised; lazily.

        Raises:
            CheckpointError: A tensor of a weight is missing or misshapen.
        """
        dense = {name: array for name, array in tensors.items() if not name.endswith(_UNUSED)}
        packed: dict[str, Packed] = {}
        for parts in self._weights(dense):
            weight = self.format.format.read(parts, self.format.settings)
            may_pack = self.pack and not parts.name.endswith(_DENSE)
            if may_pack and (kept := weight.packed(self.dtype)) is not None:
                packed[parts.name] = kept
            else:
                dense[parts.name] = weight.dense(self.dtype)
        for name, array in dense.items():
            if name.endswith(("weight", "weight_packed")) and array.dtype in (mx.uint8, mx.int8, mx.int32):
                raise CheckpointError(
                    f"[load] expected scales beside {name}, whose elements are {array.dtype}, got none. "
                    "Download the files again."
                )
        return dense, packed

    def _weights(self, tensors: Tensors) -> list[Parts]:
        """Take the tensors of quantised weights out of ``tensors``."""
        form, found = self.format.format, []
        endings = (*form.codes, *form.scales, *form.others)
        for name in list(tensors):
            scale = next((ending for ending in form.scales if name.endswith(ending)), None)
            if scale is None:
                continue
            stem = name.removesuffix(scale)
            if not any(_holds_codes(tensors.get(stem + ending)) for ending in form.codes):
                continue
            taken = {ending: tensors.pop(stem + ending) for ending in endings if stem + ending in tensors}
            found.append(Parts(stem + form.target, stem, taken))
        return found


def _holds_codes(array: mx.array | None) -> bool:
    return array is not None and mx.issubdtype(array.dtype, mx.integer)


def converting(model_class: type[nn.Module], conversion: Conversion) -> type[nn.Module]:
    """Return ``model_class`` with a ``sanitize`` that takes the checkpoint's tensors.

    What the model's own ``sanitize`` does with a weight (rename it, stack experts, split it by rows) it does here with
    packed words, scales and biases in turn, each under the weight's name.
    """
    base: Any = model_class

    def sanitize(self: Any, weights: Tensors) -> Tensors:
        own: Callable[[Any, Tensors], Tensors] = getattr(base, "sanitize", lambda _, tensors: tensors)
        twin = copy.copy(self)
        dense, packed = conversion(weights)
        tensors = dict(own(self, dense | {name: part.weight for name, part in packed.items()}))
        _drop_empty_biases(self, tensors)
        words = [name for name, array in tensors.items() if array.dtype == mx.uint32 and name.endswith(".weight")]
        if not packed:
            return tensors
        biases = {name: part.scales if part.biases is None else part.biases for name, part in packed.items()}
        for part, values in (("scales", {name: part.scales for name, part in packed.items()}), ("biases", biases)):
            found = own(copy.copy(twin), dense | values)
            for name in words:
                array = found[name]
                if part == "scales" or array.dtype != mx.uint8:
                    tensors[name.removesuffix("weight") + part] = array
        if any(part.factor is not None for part in packed.values()):
            values = {name: mx.ones((1, 1)) if part.factor is None else part.factor for name, part in packed.items()}
            found = own(copy.copy(twin), dense | {name: factor.reshape(1, 1) for name, factor in values.items()})
            factors = {name.removesuffix(".weight"): found[name] for name in words}
            conversion.factors.update(_factors(self, tensors, factors))
        return tensors

    return type(base.__name__, (base,), {"sanitize": sanitize, "__module__": base.__module__})


def _factors(module: nn.Module, tensors: Tensors, factors: Tensors) -> Tensors:
    """Return the factors of weights in a mode that has some, by the name of their layer: one, or one an expert."""
    layers = dict(module.named_modules())
    found = {path: factor for path, factor in factors.items() if tensors[f"{path}.scales"].dtype == mx.uint8}
    for path, factor in found.items():
        layer = layers.get(path)
        experts = layer.weight.shape[0] if isinstance(layer, SwitchLinear) else 1
        if not isinstance(layer, nn.Linear | SwitchLinear) or factor.size != experts:
            raise ValueError(f"{path} is no layer whose weight can have a factor")
    return found


def _drop_empty_biases(module: nn.Module, tensors: Tensors) -> None:
    """Forget biases of zeros that the model does not have: AutoGPTQ writes one for every layer."""
    leaves: Any = tree_flatten(module.parameters())
    wanted = {name for name, _ in leaves}
    for name in [name for name in tensors if name.endswith(".bias") and name not in wanted]:
        if not tensors[name].any().item():
            del tensors[name]


def quantization_of(module: nn.Module) -> dict[str, Any] | None:
    """Return mlx-lm's ``quantization`` of a model: the commonest format of its layers, and by path the others."""
    formats: dict[str, dict[str, Any]] = {}
    for path, layer in module.named_modules():
        if "scales" in layer:
            settings: Any = layer
            formats[path] = {"group_size": settings.group_size, "bits": settings.bits, "mode": settings.mode}
    if not formats:
        return None
    common = dict(Counter(tuple(form.items()) for form in formats.values()).most_common(1)[0][0])
    return {**common, **{path: form for path, form in formats.items() if form != common}}
