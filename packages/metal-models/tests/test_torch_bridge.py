import mlx.core as mx
import numpy as np
import pytest
import torch

from vllm_metal_plugin.tensor_bridge import to_mlx, to_torch

DTYPES = [
    (mx.float32, torch.float32),
    (mx.float16, torch.float16),
    (mx.bfloat16, torch.bfloat16),
    (mx.int32, torch.int32),
    (mx.uint8, torch.uint8),
    (mx.bool_, torch.bool),
]


@pytest.mark.parametrize(("dtype", "torch_dtype"), DTYPES)
def test_round_trip(dtype: mx.Dtype, torch_dtype: torch.dtype) -> None:
    array = mx.arange(12).reshape(3, 4).astype(dtype)
    tensor = to_torch(array)
    assert tensor.dtype == torch_dtype
    assert tensor.tolist() == array.tolist()
    back = to_mlx(tensor)
    assert back.dtype == dtype
    assert mx.array_equal(back, array)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_tensor_is_over_the_arrays_memory(dtype: mx.Dtype) -> None:
    array = mx.arange(6).astype(dtype)
    assert to_torch(array).data_ptr() == to_torch(array).data_ptr()


def test_tensor_outlives_the_array() -> None:
    array = mx.full((1000,), 7.0)
    tensor = to_torch(array)
    del array
    mx.eval([mx.zeros((1000,)) for _ in range(8)])
    assert tensor.eq(7).all()


def test_lazy_and_strided() -> None:
    array = (mx.arange(12).reshape(3, 4) * 2).T
    np.testing.assert_array_equal(to_torch(array).numpy(), np.array(array))
    assert to_mlx(torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).T).tolist()[1] == [1, 5, 9]
