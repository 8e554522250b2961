"""Every test here compiles kernels: without clang it fails, unless the environment asks to skip."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import simulator
from metal_kernels.simulator.toolchain import toolchain


@pytest.fixture(scope="session", autouse=True)
def clang() -> None:
    if sys.platform != "linux":
        pytest.skip("the simulator runs on Linux; here the GPU runs the kernels")
    if os.environ.get("METAL_KERNELS_SKIP_SIMULATOR"):
        try:
            toolchain()
        except simulator.ToolchainError as error:
            pytest.skip(str(error))
    toolchain()


@dataclass(frozen=True, eq=False)
class Algorithm:
    """A right kernel, ``algorithms/name.metal``, that computes ``expected`` from ``inputs`` into ``out``."""

    name: str
    inputs: dict[str, np.ndarray]
    expected: np.ndarray
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    call: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def source(self) -> str:
        return (Path(__file__).parent / "algorithms" / f"{self.name}.metal").read_text()

    def run(self, source: str, **chosen: Any) -> np.ndarray:
        """The output of ``source`` in this kernel's place."""
        kernel = simulator.metal_kernel(self.name, list(self.inputs), ["out"], source)
        with simulator.settings(**{"metal_versions": (), **chosen}):
            (out,) = kernel(
                inputs=[mx.array(value) for value in self.inputs.values()],
                output_shapes=[self.expected.shape],
                output_dtypes=[mx.uint32 if self.expected.dtype == np.uint32 else mx.float32],
                grid=self.grid,
                threadgroup=self.threadgroup,
                **self.call,
            )
        return np.array(out)


def ramp(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 17 / 4 - 2).astype(np.float32).reshape(shape)


def dequantized(words: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    nibbles = words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    return (nibbles * np.repeat(scales, 4)[:, None] + np.repeat(biases, 4)[:, None]).ravel()


def algorithm_list() -> list[Algorithm]:
    e = np.exp(ramp(3, 50))
    codes = (np.arange(256) * 7 % 23).astype(np.uint8)
    rows = ramp(3, 96)
    normed = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-3)
    taps = np.array([1, 2, 3, -2, 1], np.float32)
    words = (np.arange(20, dtype=np.uint64) * 0x9E3779B1 % (1 << 32)).astype(np.uint32)
    scales, biases = np.array([0.5, 1, 2, 0.25, 1], np.float32), np.array([-1, 0, 1, 2, -2], np.float32)
    ids = np.array([0, 5, -1, 2, 2, 9], np.int32)
    found = np.where((ids >= 0) & (ids < 6), ids, 6)
    sums = ramp(128).reshape(4, 32).sum(-1)
    return [
        Algorithm("transpose", {"a": ramp(20, 12)}, ramp(20, 12).T, (16, 24, 1), (8, 8, 1)),
        Algorithm(
            "matmul", {"a": ramp(10, 20), "b": ramp(20, 12)}, ramp(10, 20) @ ramp(20, 12), (16, 16, 1), (8, 8, 1)
        ),
        Algorithm("softmax", {"x": ramp(3, 50)}, e / e.sum(-1, keepdims=True), (192, 1, 1), (64, 1, 1)),
        Algorithm("scan", {"x": ramp(128)}, ramp(128).reshape(2, 64).cumsum(-1).ravel(), (128, 1, 1), (64, 1, 1)),
        Algorithm(
            "histogram",
            {"codes": codes},
            np.bincount(codes % 16, minlength=16).astype(np.uint32),
            (256, 1, 1),
            (64, 1, 1),
            {"init_value": 0},
        ),
        Algorithm(
            "layer_norm",
            {"x": rows, "w": ramp(96), "eps": np.float32(1e-3)},
            normed * ramp(96),
            (32, 3, 1),
            (32, 1, 1),
        ),
        Algorithm("bitonic_sort", {"x": ramp(64)}, np.sort(ramp(64))[::-1][:10].copy(), (64, 1, 1), (64, 1, 1)),
        Algorithm(
            "convolution",
            {"x": ramp(70), "taps": taps, "n": np.int32(70)},
            np.convolve(ramp(70), taps[::-1], "same"),
            (96, 1, 1),
            (32, 1, 1),
        ),
        Algorithm(
            "block_matmul",
            {"a": ramp(16, 16), "b": ramp(16, 16)[::-1].copy()},
            ramp(16, 16) @ ramp(16, 16)[::-1],
            (128, 1, 1),
            (128, 1, 1),
        ),
        Algorithm(
            "dequantize",
            {"w": words, "scales": scales, "biases": biases},
            dequantized(words, scales, biases),
            (32, 1, 1),
            (32, 1, 1),
        ),
        Algorithm(
            "embedding",
            {"ids": ids, "table": ramp(6, 16)},
            np.vstack([ramp(6, 16), np.zeros((1, 16), np.float32)])[found].ravel(),
            (16, 3, 2),
            (16, 1, 2),
            {"template": [("T", mx.float32)]},
        ),
        Algorithm(
            "last_block",
            {"x": ramp(128)},
            np.concatenate([[np.uint32(4).view(np.float32)], sums, [sums.sum()]]),
            (128, 1, 1),
            (32, 1, 1),
            {"init_value": 0},
        ),
    ]


@pytest.fixture(scope="session")
def algorithms() -> dict[str, Algorithm]:
    return {algorithm.name: algorithm for algorithm in algorithm_list()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A file's ``EDITS``: the first of each algorithm, and the others at night."""
    if "catch" in metafunc.fixturenames:
        cases = [
            pytest.param(algorithm, edit, marks=[pytest.mark.slow] if number else [], id=f"{algorithm}-{edit}")
            for algorithm, edits in metafunc.module.EDITS.items()
            for number, edit in enumerate(edits)
        ]
        metafunc.parametrize(("algorithm", "edit"), cases)


@pytest.fixture
def catch(algorithms: dict[str, Algorithm]) -> Callable[..., None]:
    """Check that a kernel is caught once ``old`` in it is ``new``."""

    def check(name: str, old: str, new: str, kind: simulator.FaultKind, at: str | None = None) -> None:
        algorithm = algorithms[name]
        assert old in algorithm.source
        source = algorithm.source.replace(old, new, 1)
        # What a private variable holds is found by comparing runs.
        schedules = {} if kind is simulator.FaultKind.UNINITIALISED_VARIABLE else {"schedules": ()}
        with pytest.raises(simulator.KernelFault) as caught:
            algorithm.run(source, **schedules)
        found = [f for f in caught.value.findings if f.kind is kind]
        assert found, str(caught.value)
        if at:
            lines = source.splitlines()
            named = [lines[int(line) - 1] for f in found for line in re.findall(rf"{name}:(\d+)", f.message)]
            assert any(at in line for line in named), str(caught.value)

    return check
