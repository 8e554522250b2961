"""Arrays between MLX and torch, over the same memory where both can reach it; needs ``metal-models[torch]``."""

import mlx.core as mx
import numpy as np
import torch

# Element types that NumPy, whose buffers torch takes, has no name for.
_UNNAMED = ((mx.bfloat16, torch.bfloat16),)


def to_torch(array: mx.array) -> torch.Tensor:
    """Return a tensor on the CPU over the memory of ``array``, which is computed first.

    Nothing may write to the tensor: MLX takes its arrays for constant. An array that is not contiguous keeps its
    strides.
    """
    for mlx_dtype, torch_dtype in _UNNAMED:
        if array.dtype == mlx_dtype:
            return to_torch(array.view(mx.uint16)).view(torch_dtype)
    mx.eval(array)
    return torch.from_numpy(np.asarray(array))


def to_mlx(tensor: torch.Tensor) -> mx.array:
    """Return an array with the elements of a tensor, float64 as float32.

    It is over the tensor's memory where that is the memory of MLX's device, and nothing may write to the tensor then.
    Memory of the CPU, which MLX has to own, is copied once.
    """
    array: mx.array = mx.from_dlpack(tensor.detach())
    return array
