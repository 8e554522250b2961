"""Runs a model's layers and its output head separately, with the model's own code for both."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_models.errors import MetalModelsError

# Names under which mlx-lm's models keep the part that turns token ids into hidden rows.
_BACKBONES = ("language_model", "model", "transformer", "backbone")


@dataclass(frozen=True)
class Boundary:
    """Where a model's hidden rows come out.

    Attributes:
        path: Attribute names from the model to the module whose output is the hidden rows.
        layers: For a backbone that also applies the head: the name, beside the last module of
            ``path``, of the list of layers, which is empty while the head runs.
    """

    path: tuple[str, ...]
    layers: str | None = None


# Backbones that return logits; the split is at their final norm instead.
_INLINE_HEADS = {
    "gemma3n": Boundary(("model", "language_model", "norm"), layers="layers"),
    "gpt_neox": Boundary(("model", "final_layer_norm"), layers="h"),
    "lille-130m": Boundary(("transformer", "norm"), layers="layers"),
}


class _Stand:
    """Answers like a module, except for the attributes it replaces."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __contains__(self, name: str) -> bool:
        return name in self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).__call__(self, *args, **kwargs)


class _Recorder(_Stand):
    """Calls the module and keeps what it returned."""

    output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._module(*args, **kwargs)
        return self.output


class _Given(_Stand):
    """Returns the rows it was given, without calling the module."""

    rows: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rows


class HeadSplit:
    """The two halves of one model.

    Both run the model class's own ``__call__`` on a stand-in for the model. In the first half
    the backbone's output is noted and the logits are left unevaluated; in the second the
    backbone is replaced by given rows. So tied embeddings, logit scaling and soft-capping stay
    the model's own code.

    Args:
        model: An mlx-lm model.
    """

    def __init__(self, model: nn.Module) -> None:
        boundary = _boundary(model)
        modules: list[Any] = [model]
        for name in boundary.path:
            modules.append(getattr(modules[-1], name))
        self._recorder, self._given = _Recorder(modules[-1]), _Given(modules[-1])
        self._body: Any = self._recorder
        self._head: Any = self._given
        emptied: dict[str, Any] = {boundary.layers: []} if boundary.layers else {}
        for module, name in reversed(list(zip(modules, boundary.path, strict=False))):
            self._body = _Stand(module, **{name: self._body})
            self._head = _Stand(module, **{name: self._head}, **emptied)
            emptied = {}
        # An inline head looks its mask up in a cache list of the usual length.
        self._head_cache = [None] * len(model.layers) if boundary.layers else None

    def hidden(self, token_ids: mx.array, cache: list[Any]) -> mx.array:
        """Return hidden rows ``[tokens, 1, hidden]`` of ids ``[tokens, 1]``."""
        self._body(token_ids, cache=cache)
        output, self._recorder.output = self._recorder.output, None
        if not isinstance(output, mx.array):
            raise MetalModelsError(
                f"[forward] expected the backbone to return hidden rows, got {type(output).__name__}."
            )
        return output

    def logits(self, rows: mx.array) -> mx.array:
        """Return logits ``[rows, 1, vocab]`` of hidden rows ``[rows, 1, hidden]``."""
        self._given.rows = rows
        logits: mx.array = self._head(mx.zeros((rows.shape[0], 1), mx.int32), cache=self._head_cache)
        self._given.rows = None
        return logits


def backbone_path(model: nn.Module) -> tuple[str, ...]:
    """Return the attribute names from ``model`` to the module that turns token ids into hidden rows.

    Raises:
        MetalModelsError: It has none under a usual name.
    """
    boundary = _boundary(model)
    return boundary.path[:-1] if boundary.layers else boundary.path


def _boundary(model: nn.Module) -> Boundary:
    """Return the declared boundary, or the innermost backbone reached by its usual names."""
    declared = _INLINE_HEADS.get(type(model).__module__.rpartition(".")[2])
    if declared is not None:
        return declared
    path: list[str] = []
    module: Any = model
    while name := next((n for n in _BACKBONES if isinstance(getattr(module, n, None), nn.Module)), None):
        path.append(name)
        module = getattr(module, name)
    if not path:
        raise MetalModelsError(
            f"[load] expected a backbone named one of {', '.join(_BACKBONES)}, got none in {type(model).__module__}."
        )
    return Boundary(tuple(path))
