"""vLLM's processed inputs as ``metal_models`` wants them."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import torch

from metal_models.multimodal import MultimodalItem
from metal_models.torch_bridge import to_mlx

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange


def to_item(feature: "MultiModalFeatureSpec") -> MultimodalItem:
    """Return one input of a request."""
    return placed_item(feature.modality, feature.mm_position, feature.data)


def placed_item(modality: str, position: "PlaceholderRange", data: "MultiModalKwargsItem | None") -> MultimodalItem:
    """Return an item from a processor's output and where its placeholders are."""
    is_embed = position.is_embed
    return MultimodalItem(
        modality=modality,
        offset=position.offset,
        length=position.length,
        is_embed=None if is_embed is None else is_embed.numpy().astype(bool),
        data=_Arrays({} if data is None else data.get_data()),
    )


class _Arrays(Mapping[str, np.ndarray | mx.array]):
    """A processor's tensors as arrays, each converted when it is asked for: pixels are copied only to be encoded."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}

    def __getitem__(self, name: str) -> np.ndarray | mx.array:
        return _array(self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _array(value: Any) -> np.ndarray | mx.array:
    """Return a value as an array: numbers with a fraction for the device, integers (grids, sizes) for the host."""
    if isinstance(value, torch.Tensor):
        return to_mlx(value) if value.is_floating_point() else value.numpy()
    if isinstance(value, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in value):
        return _array(torch.stack([torch.as_tensor(part) for part in value]))
    return np.asarray(value)
