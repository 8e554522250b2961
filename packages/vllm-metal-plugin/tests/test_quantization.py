import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
