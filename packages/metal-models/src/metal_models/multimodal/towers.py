"""What every family of towers has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int32
from mlx.utils import tree_flatten

from metal_models.errors import MetalModelsError
from metal_models.multimodal.item import MultimodalItem

# For mlx-vlm's language models that are made beside towers, never evaluated and dropped.
SMALL_TEXT: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 8, "tie_word_embeddings": True,
}  # fmt: skip


class Towers(ABC):
    """The encoders of one model, with what maps their output into its embedding space.

    Args:
        parts: What mlx-vlm's model has of ``part_names``, loaded, by name.
        config: As in the model's ``config.json``.

    Attributes:
        package: mlx-vlm's package of the family.
        part_names: Attributes of mlx-vlm's model that are towers, or single arrays beside them.
        sub_configs: Which of the configs in its config have a class of their own.
        renamers: Attributes of mlx-vlm's model that know other names and layouts of tensors; empty for itself.
        bidirectional: Kinds of items whose embeddings see each other, later ones too: see ``spans``.
    """

    package: ClassVar[str]
    part_names: ClassVar[tuple[str, ...]]
    sub_configs: ClassVar[tuple[str, ...]] = ("text", "vision")
    renamers: ClassVar[tuple[str, ...]] = ("", "vision_tower")

    def __init__(self, parts: Mapping[str, nn.Module | mx.array], config: dict[str, Any]) -> None:
        self.parts: dict[str, Any] = dict(parts)
        self.config = config
        self.bidirectional = self.bidirectional_of(config)
        arrays: Any = tree_flatten(
            [part.parameters() if isinstance(part, nn.Module) else part for part in parts.values()]
        )
        self.nbytes = sum(array.nbytes for _, array in arrays)
        self.dtype: mx.Dtype = next(a.dtype for _, a in arrays if mx.issubdtype(a.dtype, mx.floating))

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return the ``config.json`` to make mlx-vlm's model from."""
        return config

    @classmethod
    def adapt(cls, parts: Any, config: dict[str, Any]) -> None:
        """Change what mlx-vlm's modules have or do otherwise than the model.

        Args:
            parts: A module of them, not loaded.
            config: As in the model's ``config.json``.
        """
        del parts, config

    @classmethod
    def tensor_name(cls, name: str) -> str | None:
        """Return what mlx-vlm's model calls a tensor; None for one that it has no use for.

        Args:
            name: As mlx-vlm's own renaming leaves it.
        """
        return name

    @classmethod
    @abstractmethod
    def modalities_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return what a model of this family takes: of ``image``, ``video`` and ``audio``."""

    @classmethod
    def bidirectional_of(cls, config: dict[str, Any]) -> frozenset[str]:
        """Return the kinds of items whose embeddings see each other."""
        del config
        return frozenset()

    @property
    def modalities(self) -> frozenset[str]:
        """What the model takes."""
        return self.modalities_of(self.config)

    def encode(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return what an item's placeholders take, lazily.

        The width is the model's hidden size, times one more than the levels of a family with deepstack.

        Raises:
            MetalModelsError: The item is of another kind, lacks a part, or has more or fewer embeddings than
                placeholders.
        """
        if item.modality not in self.modalities:
            raise MetalModelsError(
                f"[encode] expected one of {', '.join(sorted(self.modalities))}, got {item.modality}. "
                "The model has no encoder for it."
            )
        rows = self.embeddings(item)
        if rows.shape[0] != item.num_embeds:
            raise MetalModelsError(
                f"[encode] expected {item.num_embeds} embeddings for the placeholders of an item of kind "
                f"{item.modality}, got {rows.shape[0]}. Use the processor of the same model."
            )
        return rows

    @abstractmethod
    def embeddings(self, item: MultimodalItem) -> Float[mx.array, "embeddings width"]:
        """Return the output of the family's encoder for one item."""

    def rope_positions(
        self, token_ids: Int32[np.ndarray, "tokens"], items: Sequence[MultimodalItem]
    ) -> tuple[Int32[np.ndarray, "3 tokens"], int] | None:
        """Return where the tokens of a prompt are in time, height and width; None where a position is one number.

        Args:
            token_ids: The whole prompt.
            items: All of its items, in order.

        Returns:
            The coordinates, and what to add to the position of a token after the prompt, in all three.
        """
        del token_ids, items
        return None

    def spans(self, item: MultimodalItem) -> list[tuple[int, int]]:
        """Return the ranges of a prompt whose tokens see each other, later ones too.

        What of a range is not cached has to be computed in one step, as ``bidirectional`` of ``PagedModel.forward``.

        Args:
            item: One of the prompt's.
        """
        if item.modality not in self.bidirectional:
            return []
        embeds = item.embed_positions
        ends = np.flatnonzero(np.diff(embeds) > 1)
        firsts, lasts = embeds[np.append(0, ends + 1)], embeds[np.append(ends, len(embeds) - 1)]
        return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]
