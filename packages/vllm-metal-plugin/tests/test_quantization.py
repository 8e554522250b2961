import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from vllm_metal_plugin.errors import ModelFilesError, UnsupportedConfigError
from vllm_metal_plugin.quantization import QUANTIZATION

METHODS: list[dict[str, Any]] = [
    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}, "ignore": ["lm_head"]},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    {"quant_method": "mxfp4"},
]


@pytest.fixture
def configure(model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """Make vLLM's configuration for the tiny model with more in its config.json."""

    def make(changes: dict[str, Any], **options: Any) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        path = tmp_path / "model"
        shutil.copytree(model_dir, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        return EngineArgs(model=str(path), **options).create_engine_config()

    return make


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings["quant_method"])
def test_vllm_passes_quantised_checkpoints_on(configure: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Whatever the device computes in, and to another process."""
    config = configure({"quantization_config": settings})
    assert config.model_config.quantization == QUANTIZATION
    assert pickle.loads(pickle.dumps(config)).quant_config.get_name() == QUANTIZATION


def test_naming_the_checkpoints_method_changes_nothing(configure: Callable[..., Any]) -> None:
    config = configure({"quantization_config": METHODS[1]}, quantization="awq")
    assert config.model_config.quantization == QUANTIZATION


@pytest.mark.parametrize("method", [None, "mlx"])
def test_mlx_checkpoints(configure: Callable[..., Any], method: str | None) -> None:
    settings = {"group_size": 64, "bits": 4}
    named = settings if method is None else settings | {"quant_method": method}
    config = configure({"quantization": settings, "quantization_config": named})
    assert config.model_config.quantization == (None if method is None else QUANTIZATION)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq"])
def test_other_methods_are_refused_by_name(configure: Callable[..., Any], method: str) -> None:
    with pytest.raises(ModelFilesError, match=rf"quant_method of awq, .*got '{method}'"):
        configure({"quantization_config": {"quant_method": method}})


def test_quantising_while_loading_is_refused(configure: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedConfigError, match=r"expected no --quantization .* got fp8"):
        configure({}, quantization="fp8")


def quantise_to_fp8(source: Path, stored: Path, values: Path) -> None:
    """Write a model with FP8 weights, in blocks, and one that has their values."""
    shutil.copytree(source, stored)
    shutil.copytree(source, values)
    tensors: Any = mx.load(str(source / "model.safetensors"))
    codes = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].reshape(rows // 32, 32, columns // 32, 32)
        scales = mx.abs(blocks).max(axis=(1, 3)) / 448
        wide = mx.repeat(mx.repeat(scales, 32, axis=0), 32, axis=1)
        codes |= {name: mx.to_fp8(tensors[name] / wide), f"{name}_scale_inv": scales}
        tensors[name] = mx.from_fp8(codes[name], mx.float32) * wide
    mx.save_safetensors(str(stored / "model.safetensors"), codes)
    mx.save_safetensors(str(values / "model.safetensors"), tensors)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    config = json.loads((source / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def test_served_tokens_are_those_of_the_values(
    make_engine: Callable[..., Any], model_dir: Path, tmp_path: Path
) -> None:
    from vllm import SamplingParams

    quantise_to_fp8(model_dir, tmp_path / "stored", tmp_path / "values")
    llm = make_engine(tmp_path / "stored", max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=4 << 20)
    prompt = [1, 5, 9, 17]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (served,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    module, _ = load_model(tmp_path / "values")
    expected = [int(token) for token, _ in generate_step(mx.array(prompt), module, max_tokens=8)]
    assert list(served.outputs[0].token_ids) == expected
