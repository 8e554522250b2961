from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from metal_models.multimodal import MultimodalItem, Towers
from vllm_metal_plugin.errors import MultimodalError
from vllm_metal_plugin.multimodal.prompt_items import PromptItems, RopePositions


def feature(identifier: str, offset: int, is_embed: Sequence[bool]) -> MultiModalFeatureSpec:
    mask = None if all(is_embed) else torch.tensor(is_embed)
    place = PlaceholderRange(offset=offset, length=len(is_embed), is_embed=mask)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=identifier, mm_position=place)


class Places(Towers):
    """Says of items where they are, and nothing else."""

    package = "none"
    part_names = ()

    @classmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        return frozenset({"image"})

    def embeddings(self, item: MultimodalItem) -> mx.array:
        raise NotImplementedError

    def spans(self, item: MultimodalItem) -> list[tuple[int, int]]:
        return [(item.offset, item.offset + item.length)]

    def rope_positions(self, token_ids: np.ndarray, items: Sequence[MultimodalItem]) -> tuple[np.ndarray, int]:
        return np.zeros((3, len(token_ids)), np.int32), -len(items)


def prompt() -> PromptItems:
    features = [feature("a", 2, [True] * 4), feature("b", 8, [False, True, True, False, True])]
    return PromptItems(range(16), features, Places({"part": nn.Linear(1, 1)}, {}))


@pytest.mark.parametrize("cuts", [[0, 16], [0, 4, 9, 11, 16], list(range(17))])
def test_pieces_take_every_row_once(cuts: list[int]) -> None:
    taken: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    for begin, end in pairwise(cuts):
        for piece in prompt().slices(begin, end):
            rows = range(piece.first, piece.first + len(piece.positions))
            taken[piece.identifier] += zip(piece.positions.tolist(), rows, strict=True)
    assert taken == {"a": [(2, 0), (3, 1), (4, 2), (5, 3)], "b": [(9, 0), (10, 1), (12, 2)]}


def test_a_piece_between_embeddings_takes_nothing() -> None:
    assert not list(prompt().slices(11, 12))
    assert not list(prompt().slices(13, 20))


def test_spans_may_begin_in_the_cache_but_not_end_later() -> None:
    assert prompt().spans(0, 8) == [(2, 6)]
    assert prompt().spans(4, 16) == [(4, 6), (8, 13)]
    assert prompt().spans(13, 16) == []
    with pytest.raises(MultimodalError, match="--max-num-batched-tokens"):
        prompt().spans(0, 10)


def test_coordinates_go_on_after_the_prompt() -> None:
    assert prompt().rope is not None
    rope = RopePositions(np.arange(9, dtype=np.int32).reshape(3, 3), delta=5)
    assert rope.between(1, 5).tolist() == [[1, 2, 8, 9], [4, 5, 8, 9], [7, 8, 8, 9]]
    assert rope.between(4, 5).tolist() == [[9], [9], [9]]
