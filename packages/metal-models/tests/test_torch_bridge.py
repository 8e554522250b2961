import gc

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from metal_models.torch_bridge import to_mlx, to_torch  # noqa: E402

DTYPES = ["float32", "float16", "bfloat16", "int64", "int32", "uint8", "int8", "bool"]


@pytest.mark.parametrize("name", DTYPES)
def test_round_trip(name: str) -> None:
    dtype, torch_dtype = getattr(mx, "bool_" if name == "bool" else name), getattr(torch, name)
    array = mx.arange(12).reshape(3, 4).astype(dtype)
    tensor = to_torch(array)
    assert tensor.dtype == torch_dtype
    assert tensor.tolist() == array.tolist()
    back = to_mlx(tensor)
    assert back.dtype == dtype
    assert mx.array_equal(back, array)


@pytest.mark.parametrize("name", DTYPES)
def test_tensor_is_over_the_arrays_memory(name: str) -> None:
    array = mx.ones((1 << 20,)).astype(getattr(mx, "bool_" if name == "bool" else name))
    mx.eval(array)
    before = mx.get_active_memory()
    tensor = to_torch(array)
    assert tensor.data_ptr() == np.asarray(array.view(mx.uint8)).ctypes.data
    assert mx.get_active_memory() == before


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_array_is_the_only_copy_of_a_tensor(name: str) -> None:
    """MLX has to own memory of the CPU: no array shares it, and none takes it twice."""
    tensor = torch.arange(1 << 20).to(getattr(torch, name))
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    array = to_mlx(tensor)
    mx.eval(array)
    assert mx.get_active_memory() - before == mx.get_peak_memory() - before == array.nbytes
    first = tensor[0].item()
    tensor[0] = first + 1
    assert array[0].item() == first


def test_each_outlives_the_other() -> None:
    array = mx.full((1000,), 7.0)
    tensor = to_torch(array)
    del array
    mx.eval([mx.zeros((1000,)) for _ in range(8)])
    assert tensor.eq(7).all()
    array = to_mlx(tensor)
    del tensor
    gc.collect()
    assert (array == 7).all().item()


def test_lazy_strided_and_offset() -> None:
    array = (mx.arange(12).reshape(3, 4) * 2).T
    np.testing.assert_array_equal(to_torch(array).numpy(), np.array(array))
    assert to_torch(mx.arange(8)[3:]).tolist() == [3, 4, 5, 6, 7]
    assert to_mlx(torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).T).tolist()[1] == [1, 5, 9]
    assert to_mlx(torch.arange(8)[3:]).tolist() == [3, 4, 5, 6, 7]


def test_odd_tensors() -> None:
    assert to_mlx(torch.tensor(5.0)).shape == ()
    assert to_mlx(torch.ones(0, 3)).shape == (0, 3)
    assert to_mlx(torch.ones(3, requires_grad=True)).tolist() == [1, 1, 1]
    assert to_mlx(torch.ones(3, dtype=torch.float64)).dtype == mx.float32
    assert to_torch(mx.array(5.0)).shape == ()
