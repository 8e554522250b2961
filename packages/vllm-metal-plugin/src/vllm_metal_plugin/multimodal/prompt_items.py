"""The images, video and sound of one request's prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from metal_models.multimodal import MultimodalItem, Towers
from vllm_metal_plugin.errors import MultimodalError
from vllm_metal_plugin.multimodal.items import to_item

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


@dataclass(frozen=True, eq=False)
class Slice:
    """Rows of an encoder's output that a piece of a prompt takes.

    Attributes:
        identifier: vLLM's name of the input.
        item: Its number in the prompt.
        positions: Positions in the prompt that take a row each.
        first: The first of these rows in the encoder's output; the others follow.
    """

    identifier: str
    item: int
    positions: Int32[np.ndarray, "rows"]
    first: int


@dataclass(frozen=True, eq=False)
class RopePositions:
    """Where the tokens of a request are in time, height and width.

    Attributes:
        prompt: Coordinates of the prompt's tokens.
        delta: What to add to the position of a later token.
    """

    prompt: Int32[np.ndarray, "3 tokens"]
    delta: int

    def between(self, begin: int, end: int) -> Int32[np.ndarray, "3 rows"]:
        """Return the coordinates of some tokens, sampled ones included."""
        known = self.prompt[:, begin:end]
        later = np.arange(begin + known.shape[1], end, dtype=np.int32) + np.int32(self.delta)
        return np.concatenate([known, np.broadcast_to(later, (3, len(later)))], axis=1)


class PromptItems:
    """What a prompt has beside text; nothing is converted or computed before it is asked for.

    Args:
        token_ids: The prompt, placeholders included.
        features: vLLM's inputs by position.
        towers: The model's.
    """

    def __init__(self, token_ids: Sequence[int], features: "Sequence[MultiModalFeatureSpec]", towers: Towers) -> None:
        self._token_ids = token_ids
        self._features = features
        self._towers = towers

    def item(self, number: int) -> MultimodalItem:
        """Return one input."""
        return to_item(self._features[number])

    def slices(self, begin: int, end: int) -> Iterator[Slice]:
        """Yield what the tokens from ``begin`` up to ``end`` take of each input."""
        for number, feature in enumerate(self._features):
            position = feature.mm_position
            if position.offset >= end or position.offset + position.length <= begin:
                continue
            taking = np.arange(position.length) if position.is_embed is None else np.flatnonzero(position.is_embed)
            taking = taking.astype(np.int32) + np.int32(position.offset)
            first, last = np.searchsorted(taking, (begin, end))
            if first < last:
                yield Slice(feature.identifier, number, taking[first:last], int(first))

    def spans(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the parts from ``begin`` on of ranges of tokens that see each other, later ones too.

        Raises:
            MultimodalError: A range goes on after ``end``: the tokens up to there would miss the others.
        """
        found = [(max(first, begin), last) for first, last in self._spans if first < end and last > begin]
        if any(last > end for _, last in found):
            raise MultimodalError(
                f"[multimodal] expected all tokens of an image in one step, got a step that ends at {end} in an image "
                f"from {found[-1][0]} to {found[-1][1]}. Raise --max-num-batched-tokens."
            )
        return found

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        return [span for feature in self._features for span in self._towers.spans(to_item(feature))]

    @cached_property
    def rope(self) -> RopePositions | None:
        """Coordinates of its tokens; None for a model in which a position is one number."""
        items = [to_item(feature) for feature in self._features]
        found = self._towers.rope_positions(np.asarray(self._token_ids, np.int32), items)
        return None if found is None else RopePositions(*found)
