"""A row among others is turned as mlx-lm turns it alone."""

import mlx.core as mx
import numpy as np
import pytest

from metal_models.dynamic_rope import DynamicNTKScalingRoPE

POSITIONS = (0, 3, 7, 8, 20, 500)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [8, 16])
def test_rows_turn_as_they_do_alone(dims: int, traditional: bool) -> None:
    rope = DynamicNTKScalingRoPE(dims, 8, traditional, 10000.0, 3.0)
    rows = mx.random.normal((len(POSITIONS), 2, 1, 16), key=mx.random.key(0))
    alone = mx.concatenate([rope(rows[i : i + 1], position) for i, position in enumerate(POSITIONS)])
    np.testing.assert_allclose(rope(rows, mx.array(POSITIONS)), alone, atol=1e-4)


def test_sequences_turn_row_by_row() -> None:
    rope = DynamicNTKScalingRoPE(8, 4, False, 10000.0, 2.0)
    heads = mx.random.normal((2, 3, 5, 8), key=mx.random.key(1))
    turned = rope(heads, mx.array([0, 6]))
    for batch, start in enumerate((0, 6)):
        for index in range(5):
            row = heads[batch : batch + 1, :, index : index + 1]
            np.testing.assert_allclose(
                turned[batch : batch + 1, :, index : index + 1], rope(row, start + index), atol=1e-5
            )


def test_half_precision_stays_half() -> None:
    rope = DynamicNTKScalingRoPE(8, 4, False, 10000.0, 2.0)
    assert rope(mx.zeros((3, 2, 1, 8), mx.bfloat16), mx.array([0, 1, 9])).dtype == mx.bfloat16
