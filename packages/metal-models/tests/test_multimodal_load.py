"""Towers of a checkpoint: what is found, what is refused and why."""

import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metal_models import CheckpointError, MetalModelsError, load
from metal_models.multimodal import MultimodalItem, Towers, has_towers, load_towers
from metal_models.multimodal.families.gemma4_unified import Family as Gemma4Unified
from metal_models.multimodal.families.lfm2_vl import Family as Lfm2VL
from metal_models.multimodal.families.qwen3_vl import Family
from metal_models.multimodal.load import FAMILIES
from metal_models.multimodal.mlx_vlm_models import build as build_vlm
from metal_models.multimodal.refused import REFUSED
from metal_models.registry import build

CONFIGS = Path(__file__).parent / "configs_multimodal"


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def image(rows: int = 4, columns: int = 4, length: int = 4) -> MultimodalItem:
    pixels = np.random.default_rng(0).standard_normal((rows * columns, 96)).astype(np.float32)
    return MultimodalItem(
        "image", 0, length, None, {"pixel_values": pixels, "image_grid_thw": np.array([1, rows, columns])}
    )


def write(path: Path, *, bits: int | None = None, drop: str = "nothing") -> dict[str, Any]:
    """Write a tiny Qwen3-VL as mlx-vlm's converter does."""
    pytest.importorskip("mlx_vlm")
    config = config_of("qwen3_vl")
    config["text_config"]["model_type"] = "qwen3_vl_text"
    whole: Any = nn.Module()
    whole.vision_tower = build_vlm("qwen3_vl", Family.vlm_config(config)).module.vision_tower
    whole.language_model = build(config).language_model
    if bits is not None:
        config["quantization"] = {"group_size": 32, "bits": bits}
        nn.quantize(
            whole, 32, bits, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
        )
    arrays: Any = tree_flatten(whole.parameters())
    kept = {name: array for name, array in arrays if not name.startswith(drop)}
    mx.save_safetensors(str(path / "model.safetensors"), kept)
    (path / "config.json").write_text(json.dumps(config))
    return config


def test_verdicts() -> None:
    pytest.importorskip("mlx_vlm")
    assert has_towers(config_of("qwen3_vl")).modalities == {"image", "video"}
    assert has_towers(config_of("gemma4")).modalities == {"image", "video", "audio"}
    assert [has_towers(config_of(name)).whole_items for name in ("gemma3", "qwen3_5")] == [True, False]
    silent = config_of("gemma4") | {"audio_config": None}
    assert has_towers(silent).modalities == {"image", "video"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama"}, "no encoder for 'llama'"),
        ({"model_type": "gemma3"}, "no encoder that is known"),
        ({"model_type": "llava", "vision_config": {"model_type": "vit"}}, "no encoder that is known"),
        ({"model_type": "paligemma", "vision_config": {}}, "'paligemma': all tokens of its prompts see each other"),
    ],
)
def test_reasons(config: dict[str, Any], reason: str) -> None:
    verdict = has_towers(config)
    assert not verdict
    assert reason in str(verdict.reason)


def test_every_family_of_mlx_vlm_has_a_verdict() -> None:
    pytest.importorskip("mlx_vlm")
    found: Any = find_spec("mlx_vlm")
    configs = (Path(found.origin).parent / "models").glob("*/config.py")
    encoding = {file.parent.name for file in configs if re.search("(vision|audio)_config", file.read_text())}
    modules = (import_module(f"metal_models.multimodal.families.{name}") for name in set(FAMILIES.values()))
    served = set(FAMILIES) | {module.Family.package for module in modules}
    assert not set(FAMILIES) & set(REFUSED)
    assert encoding - served <= set(REFUSED)


@pytest.mark.parametrize("bits", [None, 8])
def test_both_halves_of_a_converted_checkpoint(tmp_path: Path, bits: int | None) -> None:
    config = write(tmp_path, bits=bits)
    towers = load_towers(tmp_path, config)
    assert load(tmp_path).vocab_size == 128
    assert towers.encode(image()).shape == (4, 3 * 64)
    assert towers.nbytes > 0
    halved = load_towers(tmp_path, config, dtype=mx.bfloat16)
    assert (halved.dtype, halved.encode(image()).dtype) == (mx.bfloat16, mx.bfloat16)


@pytest.mark.parametrize(
    "name", ["deepseek_ocr", "dots_ocr", "internvl_chat", "kimi_vl", "minicpmv4_6", "qwen3_omni_moe"]
)
def test_neither_half_minds_the_others_tensors(tmp_path: Path, name: str) -> None:
    """Under mlx-vlm's names; those of published checkpoints are loaded where families are compared."""
    pytest.importorskip("mlx_vlm")
    config, family = config_of(name), import_module(f"metal_models.multimodal.families.{name}").Family
    parts = build_vlm(family.package, family.vlm_config(config), family.sub_configs).parts(family.part_names)
    if name in ("deepseek_ocr", "qwen3_omni_moe"):  # have their sizes, or are apart, only then
        family.adapt(parts, config)
    level = "thinker." if name == "qwen3_omni_moe" else ""
    arrays: Any = tree_flatten(parts.parameters())
    text: Any = tree_flatten(build(config).parameters())
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), dict(text) | {level + key: value for key, value in arrays}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).vocab_size == 128
    assert load_towers(tmp_path, config).nbytes > 0


@pytest.mark.parametrize("drop", ["vision_tower", "vision_tower.merger.linear_fc1.weight"])
def test_missing_tensors(tmp_path: Path, drop: str) -> None:
    config = write(tmp_path, drop=drop)
    with pytest.raises(CheckpointError, match=r"Missing .* vision_tower.*serve the language model alone"):
        load_towers(tmp_path, config)


def test_an_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(MetalModelsError, match=r"got 'llama'\. Serve the language model alone"):
        load_towers(tmp_path, {"model_type": "llama"})


@pytest.fixture
def towers(tmp_path: Path) -> Towers:
    return load_towers(tmp_path, write(tmp_path))


def test_items_that_do_not_fit(towers: Towers) -> None:
    with pytest.raises(MetalModelsError, match=r"expected 5 embeddings .* got 4"):
        towers.encode(image(length=5))
    with pytest.raises(MetalModelsError, match="expected one of image, video, got audio"):
        towers.encode(MultimodalItem("audio", 0, 1, None, {}))
    with pytest.raises(MetalModelsError, match="expected pixel_values for an input of kind image, got nothing"):
        towers.encode(MultimodalItem("image", 0, 1, None, {}))


def test_transformers_keeps_its_own_processors(towers: Towers) -> None:
    """Also those of which mlx-vlm replaces methods and defaults."""
    from transformers import AutoProcessor
    from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor, Lfm2VlProcessorKwargs

    assert towers.package == "qwen3_vl"
    build_vlm("lfm2_vl", Lfm2VL.vlm_config(config_of("lfm2_vl")))
    for method in (AutoProcessor.from_pretrained, Lfm2VlProcessor.__init__, Lfm2VlProcessor.__call__):
        assert method.__module__.startswith("transformers.")
    assert "from_pretrained" not in vars(Lfm2VlProcessor)
    assert vars(Lfm2VlProcessorKwargs)["_defaults"]["images_kwargs"] == {"return_row_col_info": True}


def test_a_last_stretch_of_sound_without_placeholder() -> None:
    """vLLM counts placeholders as for Gemma 4's tower: one less than stretches where the last is short."""
    unified = Gemma4Unified({"embed_audio": nn.Linear(16, 8)}, {"audio_config": {"audio_embed_dim": 16}})
    features = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    data = {"input_features_padded": features, "input_features_mask": np.ones(5, bool)}
    whole = unified.encode(MultimodalItem("audio", 0, 5, None, data))
    assert np.array_equal(unified.encode(MultimodalItem("audio", 0, 4, None, data)), whole[:4])
    with pytest.raises(MetalModelsError, match="expected 3 embeddings"):
        unified.encode(MultimodalItem("audio", 0, 3, None, data))
