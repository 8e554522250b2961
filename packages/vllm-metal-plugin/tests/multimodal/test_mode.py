import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from vllm_metal_plugin.envs import MetalEnvs, read_envs
from vllm_metal_plugin.errors import UnsupportedConfigError
from vllm_metal_plugin.multimodal.mode import limits, serving

pytest.importorskip("mlx_vlm")
VISION = {"vision_config": {"depth": 2}}


def envs(mode: str = "auto", **others: str) -> MetalEnvs:
    return read_envs({"VLLM_METAL_MULTIMODAL_MODE": mode, **others})


def checkpoint(
    directory: Path, model_type: str = "qwen2_5_vl", *, towers: bool = True, processor: bool = True, **config: Any
) -> str:
    (directory / "config.json").write_text(json.dumps({"model_type": model_type} | VISION | config))
    names = ["language_model.model.norm.weight", *(["visual.merger.weight"] if towers else [])]
    mx.save_safetensors(str(directory / "model.safetensors"), {name: mx.zeros((2,)) for name in names})
    if processor:
        (directory / "preprocessor_config.json").write_text("{}")
    return str(directory)


def test_native_where_there_are_towers(tmp_path: Path) -> None:
    for mode in ("auto", "multimodal-native"):
        served = serving(checkpoint(tmp_path), envs(mode), {})
        assert served.modalities == {"image", "video"}
        assert served.reason is None


def test_towers_one_level_below(tmp_path: Path) -> None:
    thinker = {"vision_config": {"depth": 2}, "audio_config": {"d_model": 8}}
    directory = checkpoint(tmp_path, "qwen3_omni_moe", vision_config=None, thinker_config=thinker)
    assert serving(directory, envs(), {}).modalities == {"image", "video", "audio"}
    assert serving(directory, envs(), {"image": 0, "video": 0}).modalities == {"image", "video", "audio"}


def test_a_text_model_has_nothing_to_decide(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, "llama", vision_config=None)
    for mode in ("auto", "text-only-compat", "multimodal-native"):
        served = serving(directory, envs(mode), {})
        assert (served.modalities, served.reason) == (frozenset(), None)


def test_text_only_compat_serves_any_language_model_alone(tmp_path: Path) -> None:
    for model_type in ("qwen2_5_vl", "unheard_of"):
        served = serving(checkpoint(tmp_path, model_type), envs("text-only-compat"), {})
        assert not served.modalities
        assert "text-only-compat" in (served.reason or "")


@pytest.mark.parametrize("asked", [{"image": 0, "video": 0}, {"image": {"count": 0}, "video": 0}])
def test_limits_of_zero_ask_for_text_alone(tmp_path: Path, asked: dict[str, Any]) -> None:
    for model_type in ("qwen2_5_vl", "unheard_of"):
        served = serving(checkpoint(tmp_path, model_type), envs(), asked)
        assert not served.modalities
        assert "--limit-mm-per-prompt" in (served.reason or "")


def test_sound_is_left_when_images_are_not_wanted(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, "unheard_of", audio_config={"layers": 1})
    with pytest.raises(UnsupportedConfigError):
        serving(directory, envs(), limits({"image": 0}))
    assert serving(directory, envs(), limits({"image": 0, "audio": 0})).reason is not None


def test_auto_falls_back_for_compatible_wrappers_and_language_models_alone(tmp_path: Path) -> None:
    no_processor = checkpoint(tmp_path, "qwen3_5", processor=False)
    assert "preprocessor_config.json" in (serving(no_processor, envs(), {}).reason or "")
    (tmp_path / "alone").mkdir()
    alone = checkpoint(tmp_path / "alone", "qwen2_5_vl", towers=False)
    assert "language model alone" in (serving(alone, envs(), {}).reason or "")
    for directory in (no_processor, alone):
        with pytest.raises(UnsupportedConfigError, match="VLLM_METAL_MULTIMODAL_MODE=text-only-compat"):
            serving(directory, envs("multimodal-native"), {})


def test_others_are_refused_with_the_reason(tmp_path: Path) -> None:
    for mode in ("auto", "multimodal-native"):
        with pytest.raises(UnsupportedConfigError, match="no encoder for 'unheard_of'"):
            serving(checkpoint(tmp_path, "unheard_of"), envs(mode), {})
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UnsupportedConfigError, match=r"preprocessor_config\.json"):
        serving(checkpoint(tmp_path, processor=False), envs(), {})


def test_a_missing_torchvision_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for mode in ("auto", "text-only-compat"):
        with pytest.raises(UnsupportedConfigError, match="expected torchvision"):
            serving(checkpoint(tmp_path), envs(mode), {})
    assert serving(checkpoint(tmp_path, "gemma3"), envs(), {}).modalities == {"image"}


def test_contiguous_caches_take_text(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    contiguous = {"VLLM_METAL_USE_PAGED_ATTENTION": "0"}
    assert "PAGED_ATTENTION=0" in (serving(directory, envs(**contiguous), {}).reason or "")
    with pytest.raises(UnsupportedConfigError, match="PAGED_ATTENTION=0"):
        serving(directory, envs("multimodal-native", **contiguous), {})


def test_limits() -> None:
    assert limits({"image": 0}) == {"image": 0, "video": 0}
    assert limits({"image": 0, "video": 2}) == {"image": 0, "video": 2}
    assert limits({"image": 4}, {"image", "video"}) == {"image": 4, "audio": 0}
    assert limits({"audio": 3}, {"image"}) == {"video": 0, "audio": 0}
