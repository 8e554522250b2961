"""What rows of a step take in place of their token's embedding and of one position."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int32
from mlx_lm.models import rope_utils

from metal_models.errors import MetalModelsError
from metal_models.head_split import backbone_path

_ROPES = (
    nn.RoPE,
    rope_utils.DynamicNTKScalingRoPE,
    rope_utils.Llama3RoPE,
    rope_utils.ProportionalRoPE,
    rope_utils.SuScaledRoPE,
    rope_utils.YarnRoPE,
)
_NO_TOKEN = 0  # stands for the token of a row that has an embedding of its own; families that look look for this one


@dataclass(frozen=True, eq=False)
class RowEmbeddings:
    """Rows of a step that take an encoder's output in place of their token's embedding.

    Attributes:
        rows: The rows, ascending.
        values: What they take: one or more hidden rows side by side. The first replaces the embedding; the others
            are added after the first, second … layer (deepstack).
    """

    rows: Int32[np.ndarray, "rows"]
    values: Float[mx.array, "rows width"]


@dataclass(frozen=True)
class RopeSections:
    """Which of three coordinates turns which frequency of a head (M-RoPE).

    Attributes:
        sizes: How many frequencies turn with time, height and width.
        interleaved: Whether the coordinates take turns; else each has neighbouring frequencies.
    """

    sizes: tuple[int, int, int]
    interleaved: bool

    def coordinates(self) -> Int32[np.ndarray, "frequencies"]:
        """Return the coordinate of every frequency, 0 to 2."""
        if not self.interleaved:
            return np.repeat(np.arange(3, dtype=np.int32), self.sizes)
        chosen = np.zeros(sum(self.sizes), np.int32)
        for coordinate in (1, 2):
            chosen[coordinate : 3 * self.sizes[coordinate] : 3] = coordinate
        return chosen


def rope_sections(config: dict[str, Any]) -> RopeSections | None:
    """Return the sections that a model's ``config.json`` declares; None where a position is one number."""
    config = config.get("thinker_config") or config
    text = config.get("text_config") or config
    for rope in (text.get("rope_scaling"), text.get("rope_parameters"), config.get("rope_scaling")):
        sizes = (rope or {}).get("mrope_section")
        if rope and sizes and len(sizes) == 3:
            return RopeSections(
                (sizes[0], sizes[1], sizes[2]), bool(rope.get("mrope_interleaved") or rope.get("interleaved"))
            )
    return None


class RowInputs:
    """Lets steps of one model replace embeddings and positions of some rows.

    Nothing of the model changes until the first such step; then the embedding, the rotary modules and the layers get
    subclasses of their classes, which do as before in all other steps.

    Args:
        module: The model.
        hidden_size: Width of its hidden rows.
        sections: How it turns heads by three coordinates, if it does.
    """

    def __init__(self, module: nn.Module, hidden_size: int, sections: RopeSections | None) -> None:
        self._module = module
        self._hidden_size = hidden_size
        self._sections = sections
        self._watched = False
        self._positions: mx.array | None = None
        self._coordinates: mx.array | None = None
        self._rows: mx.array | None = None
        self._parts: list[mx.array] = []

    @contextmanager
    def applied(
        self,
        positions: Int32[mx.array, "tokens"],
        embeddings: RowEmbeddings | None,
        rope_positions: Int32[mx.array, "3 tokens"] | None,
    ) -> Iterator[None]:
        """Apply to the forward pass in this context what its rows take.

        Args:
            positions: What rotary modules are called with.
            embeddings: As for ``PagedModel.forward``.
            rope_positions: The coordinates to turn heads by instead; None for ``positions``.

        Raises:
            MetalModelsError: The model turns heads by one number only, or ``embeddings`` are not hidden rows of it.
        """
        if embeddings is None and rope_positions is None:
            yield
            return
        if rope_positions is not None and self._sections is None:
            raise MetalModelsError(
                "[forward] expected no rope_positions, got some for a model without mrope_section. Leave them out."
            )
        self._watch()
        try:
            if embeddings is not None:
                self._parts = self._split(embeddings)
                self._rows = mx.array(embeddings.rows)
            self._positions, self._coordinates = positions, rope_positions
            yield
        finally:
            self._positions = self._coordinates = self._rows = None
            self._parts = []

    def without_tokens(
        self, token_ids: Int32[mx.array, "tokens"], embeddings: RowEmbeddings | None
    ) -> Int32[mx.array, "tokens"]:
        """Return the ids with a neutral one in the rows that have an embedding of their own."""
        if embeddings is None or not len(embeddings.rows):
            return token_ids
        return mx.put_along_axis(token_ids, mx.array(embeddings.rows), mx.array(_NO_TOKEN, token_ids.dtype), axis=0)

    def embedded(self, out: mx.array) -> mx.array:
        """Return what the embedding module made of a step's ids, with the rows that take something else."""
        if self._rows is None or not self._rows.size:
            return out
        rows = out.reshape(-1, out.shape[-1])
        rows[self._rows] = self._parts[0].astype(out.dtype)
        return rows.reshape(out.shape)

    def after_layer(self, index: int, out: Any) -> Any:
        """Return a layer's output with what the step adds to some rows after it; hidden rows come first in it."""
        if self._rows is None or index + 1 >= len(self._parts):
            return out
        if isinstance(out, tuple):
            return self.after_layer(index, out[0]), *out[1:]
        rows = out.reshape(-1, out.shape[-1])
        return rows.at[self._rows].add(self._parts[index + 1].astype(out.dtype)).reshape(out.shape)

    def turned(self, rope: Any, plain: Any, x: mx.array, offset: Any) -> mx.array:
        """Return heads ``x`` ``[tokens, heads, 1, head_size]``, each frequency turned by its coordinate.

        Args:
            rope: The rotary module.
            plain: Its own call.
            x: Heads.
            offset: What the model asks to turn them by.
        """
        if self._coordinates is None:
            out: mx.array = plain(rope, x, offset=offset)
            return out
        if offset is not self._positions or self._sections is None:
            raise MetalModelsError(
                "[forward] expected rotary modules to be called with the step's positions, got others. "
                "The model cannot take rope_positions."
            )
        chosen = _lanes(self._sections, *_turned_elements(rope), x.shape[-1])
        out = plain(rope, x, offset=self._coordinates[0])
        for coordinate in (1, 2):
            out = mx.where(chosen == coordinate, plain(rope, x, offset=self._coordinates[coordinate]), out)
        return out

    def _split(self, embeddings: RowEmbeddings) -> list[mx.array]:
        width = embeddings.values.shape[1]
        if width % self._hidden_size or not width:
            raise MetalModelsError(
                f"[forward] expected embeddings of a multiple of {self._hidden_size} elements, got {width}. "
                "Give the model the output of its own towers."
            )
        return list(mx.split(embeddings.values, width // self._hidden_size, axis=1))

    def _watch(self) -> None:
        """Let the modules of the model ask this object; once."""
        if self._watched:
            return
        backbone: Any = self._module
        for name in backbone_path(self._module):
            backbone = getattr(backbone, name)
        _turn_to(_embedding_of(backbone), _embedding, self)
        for index, layer in enumerate(backbone.get("layers", ())):
            _turn_to(layer, _layer, (self, index))
        if self._sections is not None:
            for _, part in backbone.named_modules():
                if isinstance(part, _ROPES):
                    _turn_to(part, _rope, self)
        self._watched = True


def _embedding_of(backbone: Any) -> Any:
    """Return the module that turns a backbone's token ids into rows."""
    found = [part for part in backbone.children().values() if isinstance(part, (nn.Embedding, nn.QuantizedEmbedding))]
    if "embed_tokens" in backbone:
        return backbone["embed_tokens"]
    if len(found) == 1:
        return found[0]
    raise MetalModelsError(
        f"[forward] expected a backbone with one embedding of tokens, got {len(found)} in {type(backbone).__name__}. "
        "The model cannot take embeddings."
    )


def _turned_elements(rope: Any) -> tuple[int, bool]:
    """Return how many elements of a head one of ``_ROPES`` turns, and whether neighbours are turned together."""
    if isinstance(rope, rope_utils.SuScaledRoPE):
        return rope.dim, False
    return rope.dims, rope.traditional


@cache
def _lanes(sections: RopeSections, dims: int, traditional: bool, head_size: int) -> mx.array:
    """Return the coordinate that turns each element of a head; elements that are not turned have any."""
    coordinates = sections.coordinates()
    if 2 * len(coordinates) != dims:
        raise MetalModelsError(
            f"[forward] expected mrope_section to sum up to {dims // 2}, got {list(sections.sizes)}. "
            "Check the model's config.json."
        )
    turned = np.repeat(coordinates, 2) if traditional else np.tile(coordinates, 2)
    return mx.array(np.pad(turned, (0, head_size - dims)))


def _turn_to(module: Any, subclass: Any, asked: Any) -> None:
    module.__class__ = subclass(type(module))
    object.__setattr__(module, "_row_inputs", asked)


@cache
def _embedding(cls: Any) -> Any:
    def call(self: Any, ids: mx.array) -> mx.array:
        inputs: RowInputs = self._row_inputs
        return inputs.embedded(cls.__call__(self, ids))

    return _subclass(cls, call)


@cache
def _layer(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs, index = self._row_inputs
        return inputs.after_layer(index, cls.__call__(self, *args, **kwargs))

    return _subclass(cls, call)


@cache
def _rope(cls: Any) -> Any:
    def call(self: Any, x: mx.array, offset: Any = 0, **kwargs: Any) -> mx.array:
        inputs: RowInputs = self._row_inputs
        return inputs.turned(self, lambda *a, **k: cls.__call__(*a, **k, **kwargs), x, offset)

    return _subclass(cls, call)


def _subclass(cls: Any, call: Any) -> Any:
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
