"""Memory that the host writes and kernels read where it lies."""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from metal_kernels.device import target

_PREFERRED_LOCATION, _ACCESSED_BY = 3, 5  # of CUmem_advise
_HOST, _DEVICE = -1, 0


def keep_with_host(memory: np.ndarray) -> bool:
    """Let kernels read an MLX array's memory without moving it to the device.

    MLX's CUDA backend has arrays that the host touches in managed memory, whose pages move to whoever touches them: a
    kernel that reads what the host has just written waits some hundred microseconds. On Metal all memory is shared.

    Args:
        memory: A NumPy view of an MLX array that is not used for anything else.

    Returns:
        Whether the memory is read in place now; if not, it moves.
    """
    if target() == "metal":
        return True
    driver = _driver() if target() == "cuda" else None
    if driver is None:
        return False
    advice = ((_PREFERRED_LOCATION, _HOST), (_ACCESSED_BY, _DEVICE))
    address, size = ctypes.c_uint64(memory.ctypes.data), ctypes.c_size_t(memory.nbytes)
    return all(driver.cuMemAdvise(address, size, kind, device) == 0 for kind, device in advice)


@cache
def _driver() -> Any:
    """Return CUDA's driver library; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
