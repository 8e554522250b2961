"""One image, video or sound of a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Bool

from metal_models.errors import MetalModelsError


@dataclass(frozen=True, eq=False)
class MultimodalItem:
    """What a processor made of one input.

    Attributes:
        modality: ``image``, ``video`` or ``audio``.
        offset: Position of its first placeholder token in the prompt.
        length: Placeholder tokens.
        is_embed: Which of them take a row of the encoder's output; None for all.
        data: The processor's outputs for this item, by the names that vLLM's processors use, without a batch axis:
            ``pixel_values``, ``image_grid_thw`` ….
    """

    modality: str
    offset: int
    length: int
    is_embed: Bool[np.ndarray, "tokens"] | None
    data: Mapping[str, np.ndarray | mx.array]

    @property
    def num_embeds(self) -> int:
        """Rows of encoder output that the prompt takes."""
        return self.length if self.is_embed is None else int(self.is_embed.sum())

    @property
    def embed_positions(self) -> np.ndarray:
        """Positions in the prompt that take a row of encoder output, int64."""
        return self.offset + (np.arange(self.length) if self.is_embed is None else np.flatnonzero(self.is_embed))

    def array(self, name: str, dtype: mx.Dtype | None = None) -> mx.array:
        """Return one of the processor's outputs.

        Args:
            name: Its name.
            dtype: What to cast it to.

        Raises:
            MetalModelsError: There is none of that name.
        """
        value: Any = self.data.get(name)
        if value is None:
            found = ", ".join(sorted(self.data)) or "nothing"
            raise MetalModelsError(
                f"[encode] expected {name} for an input of kind {self.modality}, got {found}. "
                "Give what the model's own processor returns."
            )
        array = mx.array(value)
        return array if dtype is None else array.astype(dtype)

    def integers(self, name: str) -> np.ndarray:
        """Return one of the processor's outputs as int64 on the host."""
        return np.array(self.array(name)).astype(np.int64)
