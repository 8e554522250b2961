"""Memory that kernels read where the host wrote it."""

import mlx.core as mx
import numpy as np

from metal_kernels import keep_with_host, target


def test_says_whether_kernels_read_it_in_place():
    array = mx.arange(64)
    mx.eval(array)
    memory = np.array(array, copy=False)
    assert keep_with_host(memory) == (target() != "cpu")
    memory[3] = 7
    assert array[3].item() == 7
