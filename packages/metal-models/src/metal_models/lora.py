"""LoRA adapters over one model: each row of a step may have its own, and the base weights are not touched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Int32

from metal_models.errors import AdapterError, MetalModelsError
from metal_models.lora_files import LowRank, check_complete, read_config, read_tensors

_LINEARS = (nn.Linear, nn.QuantizedLinear)

# What the names of encoders' modules contain; their layers have numbers and names like the language model's.
_ENCODERS = ("audio", "connector", "projector", "speech", "vision", "visual")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter.

    Attributes:
        layers: What it adds, by the name of the model's module.
        nbytes: Its size.
    """

    layers: dict[str, LowRank]
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows of a step that share an adapter; ``rows`` is None where these are all rows."""

    adapter: int
    rows: mx.array | None


class LoraLayers:
    """The linear layers of a model that adapters can reach, and the adapters that are loaded.

    Nothing of the model changes until the first adapter is added; then the modules that an adapter is for get a
    subclass of their class, which adds ``x @ a @ b`` for the rows that use it. Layers that run over sequences rather
    than rows, the embedding, the head and experts cannot be adapted.

    Args:
        module: The model.
        dtype: Of its hidden rows, which adapters are cast to.
    """

    def __init__(self, module: nn.Module, dtype: mx.Dtype) -> None:
        self._dtype = dtype
        self._targets = _targets(module)
        self._by_ending = {_ending(name): name for name in self._targets}
        self._adapters: dict[int, Adapter] = {}
        self._adapter_ids = np.zeros(0, np.int32)
        self._groups: tuple[_Group, ...] = ()

    @property
    def active(self) -> bool:
        """Whether a row of the step under way uses an adapter."""
        return bool(self._groups)

    @property
    def ids(self) -> set[int]:
        """Adapters that are loaded."""
        return set(self._adapters)

    def bytes_at_rank(self, rank: int) -> int:
        """Return the size of an adapter of all layers that has the same rank everywhere."""
        widths = (sum(_shape(layer)) for layer in self._targets.values())
        return sum(width * rank * self._dtype.size for width in widths)

    def load(self, path: str | Path, *, max_rank: int) -> Adapter:
        """Read an adapter in PEFT's format.

        Args:
            path: Its directory.
            max_rank: The largest rank that is accepted.

        Raises:
            AdapterError: It is incomplete, damaged, unsupported, too large or for another model.
        """
        directory = Path(path)
        config, tensors = read_config(directory), read_tensors(directory)
        ours = {module: self._name_of(module, directory) for module in tensors}
        theirs = {name: module for module, name in ours.items()}
        check_complete(config, tensors.keys(), (theirs.get(name, name) for name in self._targets), directory)
        layers = {}
        for module, parts in tensors.items():
            rank = config.rank_of(module)
            if rank > max_rank:
                raise AdapterError(
                    f"[lora] expected a rank of at most {max_rank}, got {rank} for {module} in {directory}. "
                    "Raise --max-lora-rank."
                )
            output, inputs = _shape(self._targets[ours[module]])
            for part, expected in (("A", (rank, inputs)), ("B", (output, rank))):
                if parts[part].shape != expected:
                    raise AdapterError(
                        f"[lora] expected {module}.lora_{part}.weight of shape {expected}, got {parts[part].shape} in "
                        f"{directory}. The adapter is for another model."
                    )
            scaled = parts["B"].astype(mx.float32).T * config.scale_of(module)
            layers[ours[module]] = LowRank(parts["A"].T.astype(self._dtype), scaled.astype(self._dtype))
        arrays = [array for layer in layers.values() for array in (layer.a, layer.b)]
        mx.eval(arrays)
        return Adapter(layers, sum(array.nbytes for array in arrays))

    def add(self, adapter_id: int, adapter: Adapter) -> None:
        """Let rows use ``adapter`` under a number above 0; it replaces one of the same number."""
        if adapter_id < 1:
            raise MetalModelsError(f"[lora] expected a number above 0, got {adapter_id}. 0 stands for no adapter.")
        for name in adapter.layers:
            _adapt(self._targets[name], self, name)
        self._adapters[adapter_id] = adapter

    def remove(self, adapter_id: int) -> bool:
        """Forget an adapter; return whether it was loaded."""
        return self._adapters.pop(adapter_id, None) is not None

    @contextmanager
    def applied(self, adapter_ids: Int32[np.ndarray, "tokens"]) -> Iterator[None]:
        """Apply to each row of the forward pass in this context the adapter of its number, 0 being none.

        Raises:
            MetalModelsError: A number stands for no adapter.
        """
        used = [int(number) for number in np.unique(adapter_ids) if number]
        for number in used:
            if number not in self._adapters:
                raise MetalModelsError(
                    f"[lora] expected one of the loaded adapters, got number {number}. Add it first."
                )
        self._use(adapter_ids)
        try:
            yield
        finally:
            self._groups = ()

    @contextmanager
    def among(self, rows: Int32[np.ndarray, "some"]) -> Iterator[None]:
        """Within ``applied``: the forward pass in this context is of these rows of the step alone, in this order."""
        whole = self._adapter_ids
        if not self._groups:
            yield
            return
        self._use(whole[rows])
        try:
            yield
        finally:
            self._use(whole)

    def add_to(self, name: str, x: mx.array, out: mx.array) -> mx.array:
        """Return a layer's output with what the step's adapters add to it.

        Args:
            name: The layer.
            x: Its input, one row for each row of the step.
            out: Its output.
        """
        groups = [
            (group.rows, layer)
            for group in self._groups
            if (layer := self._adapters[group.adapter].layers.get(name)) is not None
        ]
        if not groups:
            return out
        rows, outputs = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        if len(rows) != len(self._adapter_ids):
            raise MetalModelsError(
                f"[lora] expected {len(self._adapter_ids)} rows at {name}, got {len(rows)}. The layer does not take a "
                "step's rows and cannot be adapted."
            )
        for selected, layer in groups:
            if selected is None:
                outputs = outputs + (rows @ layer.a) @ layer.b
            else:
                outputs = outputs.at[selected].add((rows[selected] @ layer.a) @ layer.b)
        return outputs.reshape(out.shape)

    def _use(self, adapter_ids: np.ndarray) -> None:
        """Group the rows of a forward pass by their adapters."""
        self._adapter_ids = adapter_ids
        used = (int(number) for number in np.unique(adapter_ids) if number)
        self._groups = tuple(_Group(number, _rows(adapter_ids == number)) for number in used)

    def _name_of(self, module: str, directory: Path) -> str:
        """Return the model's name for a module that an adapter names."""
        if any(word in module for word in _ENCODERS):
            raise AdapterError(
                f"[lora] expected an adapter of the language model's layers, got {module} in {directory}, which "
                "belongs to an encoder. Train one whose target_modules leave encoders out."
            )
        name = module if module in self._targets else self._by_ending.get(_ending(module))
        if name is None:
            raise AdapterError(
                f"[lora] expected a linear layer of the model that can be adapted, got {module} in {directory}. "
                "The adapter is for another model, or for a kind of layer that is not supported."
            )
        return name


def _rows(used: np.ndarray) -> mx.array | None:
    return None if used.all() else mx.array(np.flatnonzero(used).astype(np.int32))


def _targets(module: nn.Module) -> dict[str, Any]:
    """Return the linear layers within the model's list of layers, save those that run over sequences.

    Experts in a list of their own (two numbers in a name) see some of a step's rows only.
    """
    over_sequences = [name for name, part in module.named_modules() if getattr(part, "takes_state_views", False)]
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _LINEARS)
        and sum(piece.isdigit() for piece in name.split(".")) == 1
        and not any(name.startswith(f"{outer}.") for outer in over_sequences)
    }


def _ending(name: str) -> str:
    """Return the part of a module's name from the number of its layer on: what is before it differs by library."""
    pieces = name.split(".")
    first: Sequence[int] = [index for index, piece in enumerate(pieces) if piece.isdigit()]
    return ".".join(pieces[first[0] :]) if first else name


def _shape(layer: Any) -> tuple[int, int]:
    """Return a linear layer's numbers of outputs and inputs."""
    output, inputs = layer.weight.shape
    return output, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs


def _adapt(layer: Any, lora: LoraLayers, name: str) -> None:
    """Let a layer ask for its additions; idempotent."""
    kind: Any = type(layer)
    if not getattr(kind, "takes_adapters", False):
        layer.__class__ = _adapted(kind)
        object.__setattr__(layer, "_lora", (lora, name))


@cache
def _adapted(cls: Any) -> Any:
    def call(self: Any, x: mx.array) -> mx.array:
        lora, name = self._lora
        out: mx.array = cls.__call__(self, x)
        return lora.add_to(name, x, out) if lora.active else out

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "takes_adapters": True})
