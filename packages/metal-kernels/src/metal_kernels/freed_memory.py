"""Let MLX's CPU backend use freed memory again on Linux, where each of its arrays is an allocation of its own.

MLX's CPU backend keeps no freed buffers, and glibc gives large ones back to the system: every array of a step is then
memory that the system has to clear first, page by page, which takes longer than filling it.
"""

import ctypes
import os
import sys

from metal_kernels.blas import cpu_wheel_folders

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_KEPT_BYTES = 256 << 20
_LARGEST_KEPT_BYTES = 32 << 20  # glibc takes no more
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let the process keep up to 256 MB that it has freed; does nothing off Linux or without the mlx-cpu wheel.

    Does nothing either where the environment has settings of its own for glibc. It holds for all of the process, so
    a program asks for it, never a library when it is imported.

    Returns:
        Whether freed memory is kept.
    """
    if sys.platform != "linux" or not cpu_wheel_folders() or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
