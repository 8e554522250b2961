"""What the plugin tells of MLX's device, and asks of it."""

from metal_kernels import target
from vllm_metal_plugin.device import device_name, free_memory_bytes, system_memory_bytes, wire_memory


def test_the_device_has_a_name_and_memory() -> None:
    assert device_name(target()).split()[0] in {"Apple", "NVIDIA", "CPU"}
    assert 0 < free_memory_bytes() <= system_memory_bytes()


def test_only_metal_wires_memory() -> None:
    assert "no effect" in wire_memory("cpu", 1 << 30)
