"""Arrays between MLX and torch on the CPU, from the same memory where both can name the element type."""

import mlx.core as mx
import numpy as np
import torch

# Element types that NumPy, whose buffers both libraries take, has no name for.
_UNNAMED = ((mx.bfloat16, torch.bfloat16),)


def to_torch(array: mx.array) -> torch.Tensor:
    """Return a tensor over the memory of ``array``, which is computed first.

    Nothing may write to the tensor: MLX takes its arrays for constant. An array that is not contiguous is copied.
    """
    for mlx_dtype, torch_dtype in _UNNAMED:
        if array.dtype == mlx_dtype:
            return to_torch(array.view(mx.uint16)).view(torch_dtype)
    mx.eval(array)
    return torch.from_numpy(np.asarray(array))


def to_mlx(tensor: torch.Tensor) -> mx.array:
    """Return an array with the elements of a tensor; MLX owns its memory, so they are copied once."""
    tensor = tensor.detach().cpu()
    for mlx_dtype, torch_dtype in _UNNAMED:
        if tensor.dtype == torch_dtype:
            return mx.array(tensor.contiguous().view(torch.uint16).numpy()).view(mlx_dtype)
    return mx.array(tensor.numpy())
