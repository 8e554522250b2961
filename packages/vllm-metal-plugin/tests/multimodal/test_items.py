import mlx.core as mx
import numpy as np
import torch
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalSharedField,
    PlaceholderRange,
)

from vllm_metal_plugin.multimodal.items import to_item


def feature(**tensors: object) -> MultiModalFeatureSpec:
    field = MultiModalSharedField(batch_size=1)
    data = MultiModalKwargsItem(
        {name: MultiModalFieldElem(data=value, field=field) for name, value in tensors.items()}
    )
    place = PlaceholderRange(offset=3, length=3, is_embed=torch.tensor([True, False, True]))
    return MultiModalFeatureSpec(data=data, modality="image", identifier="a", mm_position=place)


def test_pixels_go_to_the_device_and_grids_stay_on_the_host() -> None:
    item = to_item(
        feature(
            pixel_values=torch.tensor([[0.5, 1.5]], dtype=torch.bfloat16),
            image_grid_thw=torch.tensor([1, 2, 4]),
            second_per_grid_ts=0.5,
            crops=[torch.zeros(2, 3), torch.ones(2, 3)],
            missing=None,
        )
    )
    assert (item.modality, item.offset, item.length, item.num_embeds) == ("image", 3, 3, 2)
    pixels = item.data["pixel_values"]
    assert isinstance(pixels, mx.array)
    assert pixels.dtype == mx.bfloat16
    assert pixels.tolist() == [[0.5, 1.5]]
    grid = item.data["image_grid_thw"]
    assert isinstance(grid, np.ndarray)
    assert grid.tolist() == [1, 2, 4]
    assert float(item.data["second_per_grid_ts"]) == 0.5
    assert item.data["crops"].shape == (2, 2, 3)
    assert "missing" not in item.data


def test_an_item_without_data_is_still_placed() -> None:
    spec = feature()
    spec.data = None
    spec.mm_position = PlaceholderRange(offset=1, length=2)
    item = to_item(spec)
    assert item.is_embed is None
    assert not item.data
