"""How weights are held, and that loading them takes little more memory than they do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metal_models.registry import build
from metal_models.residence import evaluate, expand, expanded_nbytes, nbytes

NUM_SHARDS = 4
BIG = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 32, "head_dim": 128, "vocab_size": 1024}
# For each case: loads a model and prints by how much that raised the process's memory at most, and what it holds.
PROBE = """
import gc, json, os, resource, sys
import mlx.core as mx
from metal_models import load

def memory(peak):
    if not os.path.exists("/proc/self/clear_refs"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024

mx.set_cache_limit(0)
cases = json.loads(sys.argv[1])
load(cases[0][0])
for path, dtype, expand_to_bytes in cases:
    gc.collect()
    before = memory(False)
    if os.path.exists("/proc/self/clear_refs"):
        open("/proc/self/clear_refs", "w").write("5")
    model = load(path, dtype=getattr(mx, dtype), expand_to_bytes=expand_to_bytes)
    print(memory(True) - before, model.nbytes, flush=True)
    del model
"""


def write(path: Path, config: dict[str, Any], tensors: dict[str, mx.array]) -> Path:
    path.mkdir()
    names = sorted(tensors)
    index = {}
    for shard in range(NUM_SHARDS):
        file = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        mx.save_safetensors(str(path / file), {name: tensors[name] for name in names[shard::NUM_SHARDS]})
        index.update(dict.fromkeys(names[shard::NUM_SHARDS], file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps(config))
    return path


def plain(name: str, weight: mx.array) -> dict[str, mx.array]:
    return {name: mx.zeros(weight.shape, mx.bfloat16)}


def fp8(name: str, weight: mx.array) -> dict[str, mx.array]:
    if not name.endswith("_proj.weight"):
        return plain(name, weight)
    blocks = tuple(-(-size // 128) for size in weight.shape)
    return {name: mx.zeros(weight.shape, mx.uint8), f"{name}_scale_inv": mx.full(blocks, 1.5)}


def gptq(name: str, weight: mx.array) -> dict[str, mx.array]:
    if not name.endswith("_proj.weight"):
        return plain(name, weight)
    rows, columns = weight.shape
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": mx.zeros((columns // 8, rows), mx.int32),
        f"{stem}qzeros": mx.zeros((columns // 64, rows // 8), mx.int32),
        f"{stem}scales": mx.ones((columns // 64, rows), mx.float16),
    }


def affine(name: str, weight: mx.array) -> dict[str, mx.array]:
    if not name.endswith("_proj.weight"):
        return plain(name, weight)
    stem = name.removesuffix("weight")
    parts = mx.quantize(mx.zeros(weight.shape, mx.bfloat16), group_size=64, bits=4)
    return dict(zip((name, f"{stem}scales", f"{stem}biases"), parts, strict=True))


FORMATS: dict[str, tuple[Callable[[str, mx.array], dict[str, mx.array]], dict[str, Any]]] = {
    "plain": (plain, {}),
    "fp8": (fp8, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
    "gptq": (gptq, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "affine": (affine, {"quantization": {"group_size": 64, "bits": 4}}),
}


CASES = [
    ("plain", "bfloat16", 0),
    ("plain", "float32", 0),
    ("fp8", "bfloat16", 0),
    ("gptq", "float16", 0),
    ("affine", "float32", 1 << 40),
]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], tuple[int, int]]:
    """By case: what loading took of memory beyond what there was, at most, and what the weights take."""
    directory = tmp_path_factory.mktemp("models")
    config = json.loads((Path(__file__).parent / "configs" / "qwen3.json").read_text()) | BIG
    leaves: Any = tree_flatten(build(config).parameters())
    for form, (store, settings) in FORMATS.items():
        tensors = {key: value for name, array in leaves for key, value in store(name, array).items()}
        write(directory / form, config | settings, tensors)
    cases = [(str(directory / form), *rest) for form, *rest in CASES]
    # Memory that is given back must leave the process: no heap of freed arrays.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROBE, json.dumps(cases)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    return dict(zip(CASES, lines, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_peak_memory(grown: dict[tuple[str, str, int], tuple[int, int]], case: tuple[str, str, int]) -> None:
    added, held = grown[case]
    assert held > 40_000_000
    assert held * 0.9 < added <= 1.15 * held


MODES = [("affine", 64, 4), ("affine", 32, 3), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


def quantised(lab: Any, name: str, mode: str, group_size: int, bits: int) -> nn.Module:
    module = build(lab.read_config(name) | {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64})
    nn.quantize(module, group_size, bits, mode=mode, class_predicate=lambda _, layer: hasattr(layer, "to_quantized"))
    evaluate(module)
    return module


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_expanding(lab: Any, name: str, mode: str, group_size: int, bits: int) -> None:
    module = quantised(lab, name, mode, group_size, bits)
    ids = mx.array([[1, 2, 3]])
    before = np.array(module(ids).astype(mx.float32))
    expected = expanded_nbytes(module, mx.float32)
    assert expected > 2 * nbytes(module)
    expand(module, mx.float32)
    assert nbytes(module) == expected
    assert not any("scales" in layer for _, layer in module.named_modules())
    np.testing.assert_allclose(np.array(module(ids)), before, rtol=0.05, atol=0.02)


def test_plain_weights_stay(lab: Any) -> None:
    module = build(lab.read_config("qwen3"))
    evaluate(module)
    assert expanded_nbytes(module) == nbytes(module) == sum(array.nbytes for _, array in tree_flatten(module))
    before = module.layers[0].mlp.up_proj.weight
    expand(module)
    assert module.layers[0].mlp.up_proj.weight is before
