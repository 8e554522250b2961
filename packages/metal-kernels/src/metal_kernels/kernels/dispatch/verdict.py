"""What every verdict is made of."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import mlx.core as mx

_Variant = TypeVar("_Variant")
FLOAT_DTYPES = (mx.float16, mx.bfloat16, mx.float32)
HEAD_SIZES = (64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (8, 16, 32)
MIN_CHANNELS = 8  # MLX passes smaller arrays as constant memory


@dataclass(frozen=True)
class Accepted(Generic[_Variant]):
    """The variant to launch."""

    variant: _Variant


@dataclass(frozen=True)
class Rejected:
    """Why plain MLX has to do it."""

    why: str
