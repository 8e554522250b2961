"""The target follows MLX's default device."""

import mlx.core as mx

from metal_kernels import target


def test_cpu_device_is_the_cpu_target():
    with mx.stream(mx.cpu):
        mx.set_default_device(mx.cpu)
        assert target() == "cpu"
