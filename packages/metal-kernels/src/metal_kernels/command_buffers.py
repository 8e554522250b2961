"""Let MLX put a whole step into few command buffers.

MLX ends a command buffer after some number of operations, or once the elements of their inputs exceed a limit that
one layer's cache pages exceed alone: every layer then commits its own.
Upstream: https://github.com/ml-explore/mlx/issues/3192.
"""

import os
import sys

_MILLIONS_OF_ELEMENTS = "4000"
_OPERATIONS = "500"


def allow_large_command_buffers() -> None:
    """Raise MLX's limits where the environment does not set them; must run before ``mlx.core`` is imported."""
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", _MILLIONS_OF_ELEMENTS)
    if sys.platform == "darwin":
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", _OPERATIONS)
