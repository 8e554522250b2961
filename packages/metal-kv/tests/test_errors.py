import pytest

import metal_kv


@pytest.mark.parametrize(
    "error",
    [metal_kv.SpecError, metal_kv.BlockTableError, metal_kv.OutOfBlocksError, metal_kv.NotEnoughMemoryError],
)
def test_every_error_is_a_metal_kv_error_and_a_value_error(error):
    assert issubclass(error, metal_kv.MetalKVError)
    assert issubclass(error, ValueError)
