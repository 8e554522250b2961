import json
import shutil
from pathlib import Path

import pytest

from vllm_metal_plugin.errors import ModelFilesError
from vllm_metal_plugin.preflight import check_model_files, keeps_states


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def test_complete_model_passes(model_dir: Path) -> None:
    check_model_files(str(model_dir))


def test_missing_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        check_model_files(str(copy))


def test_missing_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelFilesError, match="safetensors"):
        check_model_files(str(copy))


def test_truncated_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFilesError, match="truncated"):
        check_model_files(str(copy))


def test_unknown_architecture(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "nobody_knows_it"}))
    with pytest.raises(ModelFilesError, match="nobody_knows_it"):
        check_model_files(str(copy))


def test_which_models_keep_states(model_dir: Path, tmp_path: Path) -> None:
    assert not keeps_states(str(model_dir))
    config = {"model_type": "mamba", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "state_size": 4}
    rest = {"num_hidden_layers": 1, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | rest))
    assert keeps_states(str(tmp_path))
