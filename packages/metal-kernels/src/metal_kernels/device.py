"""Which of MLX's backends the kernels run on."""

from typing import Literal

import mlx.core as mx

Target = Literal["metal", "cuda", "cpu"]


def target() -> Target:
    """Return the backend of MLX's default device.

    Read at every call: a later ``mx.set_default_device`` is followed.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"
