"""What a format of checkpoints is: which tensors make up a quantised weight, and how they read as one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metal_models.errors import CheckpointError
from metal_models.weights.bits import PACKED_BITS
from metal_models.weights.stored import GROUP_SIZES, StoredWeight


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of one weight.

    Attributes:
        name: Of the weight, once it is read.
        stem: What the tensors' names have in common.
        tensors: By the rest of their names.
    """

    name: str
    stem: str
    tensors: Mapping[str, mx.array]

    def __getitem__(self, ending: str) -> mx.array:
        """Return the tensor of that ending.

        Raises:
            CheckpointError: There is none.
        """
        if ending not in self.tensors:
            raise CheckpointError(
                f"[load] expected a tensor {self.stem}{ending} beside {self.stem}{next(iter(self.tensors))}, "
                "got none. Download the files again."
            )
        return self.tensors[ending]

    def get(self, ending: str) -> mx.array | None:
        """Return the tensor of that ending, if there is one."""
        return self.tensors.get(ending)

    def misshapen(self, ending: str, expected: str) -> CheckpointError:
        """Return the error for a tensor that does not fit the others."""
        return CheckpointError(
            f"[load] expected {expected} in {self.stem}{ending}, got shape {self.tensors[ending].shape}. "
            "Check that the files and config.json belong together."
        )


@dataclass(frozen=True)
class MLXForm:
    """The arguments of ``mx.quantize``."""

    bits: int
    group_size: int
    mode: str = "affine"

    @classmethod
    def affine(cls, bits: int, group_size: int | None) -> "MLXForm | None":
        """Return the form of codes with a scale for so many columns, or for a row; None where MLX has none."""
        width = group_size if group_size and group_size > 0 else max(GROUP_SIZES)
        size = next((size for size in GROUP_SIZES if width % size == 0), None)
        return None if size is None else cls(next(held for held in PACKED_BITS if held >= bits), size)


@dataclass(frozen=True)
class Format:
    """How one kind of checkpoint stores its quantised weights.

    Attributes:
        codes: Endings of the name of the tensor of codes; what is before it is the stem.
        scales: Endings of the name of the tensor of scales.
        others: Of tensors that a weight may have besides.
        target: Ending of the weight's own name, after the stem.
        read: Make a weight of its tensors, given the checkpoint's ``quantization_config``.
        kept: By that configuration, in which of MLX's forms a module of this name will stay; None for floats.
        check: Refuse a checkpoint by that configuration.
    """

    codes: tuple[str, ...]
    scales: tuple[str, ...]
    others: tuple[str, ...]
    target: str
    read: Callable[[Parts, Mapping[str, Any]], StoredWeight]
    kept: Callable[[str, Mapping[str, Any]], MLXForm | None]
    check: Callable[[Mapping[str, Any]], None] = lambda _: None
