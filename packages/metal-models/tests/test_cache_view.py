"""The cache protocol, as mlx-lm's models use it."""

import mlx.core as mx
import pytest
from mlx_lm.models.base import create_attention_mask

from metal_models import MetalModelsError
from metal_models.cache_view import CacheView, PagedMask, Step


@pytest.fixture
def step() -> Step:
    step = Step()
    step.positions = mx.array([4, 0, 1], mx.int32)
    return step


def rows(heads: int = 2) -> mx.array:
    return mx.zeros((3, heads, 1, 8))


def test_offset_is_the_position_of_every_row(step: Step) -> None:
    assert CacheView(step, None).offset.tolist() == [4, 0, 1]


def test_mask_carries_the_window_asked_for(step: Step) -> None:
    hidden = mx.zeros((3, 1, 16))
    view = CacheView(step, None)
    assert create_attention_mask(hidden, view, window_size=8) == PagedMask(step, 8)
    assert create_attention_mask(hidden, view, return_array=True, window_size=8) == PagedMask(step, 8)


def test_an_array_without_a_window_would_hide_nothing(step: Step) -> None:
    hidden = mx.zeros((3, 1, 16))
    assert create_attention_mask(hidden, CacheView(step, None)) == PagedMask(step, None)
    assert create_attention_mask(hidden, CacheView(step, None), return_array=True) is None


def test_mask_falls_back_to_the_window_of_the_cache(step: Step) -> None:
    assert CacheView(step, 16).make_mask(1) == PagedMask(step, 16)


@pytest.mark.parametrize(("own", "asked", "expected"), [(None, 8, 8), (4, 8, 8), (4, None, 4), (None, None, None)])
def test_window_of_the_mask_wins(step: Step, own: int | None, asked: int | None, expected: int | None) -> None:
    assert CacheView(step, own).window_of(PagedMask(step, asked)) == expected


def test_rows_come_back_as_they_went_in(step: Step) -> None:
    view, keys, values = CacheView(step, None), rows(), rows()
    stored = view.update_and_fetch(keys, values)
    assert stored[0] is keys
    assert stored[1] is values
    assert view.keys_and_values()[0] is keys


def test_rows_do_not_outlive_their_step(step: Step) -> None:
    view = CacheView(step, None)
    view.update_and_fetch(rows(), rows())
    step.end()
    with pytest.raises(MetalModelsError, match="stored earlier in this step"):
        view.keys_and_values()


def test_keys_lead_to_the_layer_that_stored_them(step: Step) -> None:
    first, second = CacheView(step, None), CacheView(step, None)
    keys, _ = first.update_and_fetch(rows(), rows())
    second.update_and_fetch(rows(), rows())
    assert step.owner(keys, first) is first
    assert step.owner(keys, second) is first
    assert step.owner(keys, None) is first


def test_changed_keys_are_refused(step: Step) -> None:
    view = CacheView(step, None)
    keys, _ = view.update_and_fetch(rows(), rows())
    with pytest.raises(MetalModelsError, match="changes its keys"):
        step.owner(mx.repeat(keys, 2, axis=1), view)
