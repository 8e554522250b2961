"""What vLLM's processors make of inputs is what towers take, for checkpoints that transformers does not write."""

import json
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from metal_models.checkpoint import read_config
from metal_models.multimodal import load_towers
from metal_models.multimodal.mlx_vlm_models import build
from vllm_metal_plugin.multimodal.items import placed_item

pytest.importorskip("mlx_vlm")
pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

VOCAB = 160
CONFIGS = Path(__file__).parents[3] / "metal-models" / "tests" / "configs_multimodal"


@dataclass(frozen=True)
class Published:
    """A tiny checkpoint with the config of metal-models' tests.

    Attributes:
        files: Of its processor.
        tokens: Of its processor, by number.
        named: Which of them its tokenizer has names for.
        prefix: Of its towers' tensors.
        sized: Whether its towers have their sizes only when they are adapted.
        changes: To the config.
        modalities: What it takes.
    """

    files: dict[str, dict[str, Any]]
    tokens: dict[int, str]
    named: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    sized: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = ("image",)


OMNI_TOKENS = {
    119: "<|audio_pad|>", 120: "<|image_pad|>", 121: "<|video_pad|>", 122: "<|vision_start|>", 123: "<|vision_end|>",
    124: "<|audio_start|>", 125: "<|audio_end|>",
}  # fmt: skip
MINICPM_TOKENS = {
    112: "<image>", 113: "</image>", 114: "<slice>", 115: "</slice>", 116: "<image_id>", 117: "</image_id>",
    120: "<|image_pad|>", 121: "<|video_pad|>",
}  # fmt: skip
SLICES = {
    "processor_class": "MiniCPMV4_6Processor", "patch_size": 4, "scale_resolution": 32, "max_slice_nums": 4,
    "slice_mode": True, "use_image_id": True, "downsample_mode": "16x",
}  # fmt: skip
FAMILIES = {
    "deepseek_ocr": Published(
        {"processor_config.json": {
            "processor_class": "DeepseekVLV2Processor", "candidate_resolutions": [[1024, 1024]], "patch_size": 16,
            "downsample_ratio": 4, "image_token": "<image>", "pad_token": "<pad>",
        }},
        {110: "<image>", 111: "<pad>"}, sized=True,
    ),
    "dots_ocr": Published(
        {"preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", "patch_size": 4,
            "temporal_patch_size": 1, "merge_size": 2, "min_pixels": 64, "max_pixels": 2304,
        }},
        {120: "<|imgpad|>", 121: "<|video_pad|>"},
    ),
    "internvl_chat": Published(
        {"preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"}},
        {110: "<image>", 111: "<img>", 112: "</img>", 120: "<IMG_CONTEXT>", 121: "<|video_pad|>", 113: "<video>"},
        modalities=("image", "video"),
    ),
    "lighton_ocr": Published(
        {
            "processor_config.json": {
                "processor_class": "PixtralProcessor", "patch_size": 4, "spatial_merge_size": 2,
                "image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>",
                "image_end_token": "<|vision_end|>",
            },
            "preprocessor_config.json": {
                "image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 4, "width": 4},
                "size": {"longest_edge": 64},
            },
        },
        {120: "<|image_pad|>", 122: "<|vision_pad|>", 123: "<|vision_end|>"},
        changes={"image_token_index": 120, "projector_hidden_act": "gelu", "multimodal_projector_bias": False},
    ),
    "minicpmv4_6": Published(
        {
            "preprocessor_config.json": SLICES | {"image_processor_type": "MiniCPMV4_6ImageProcessor"},
            "video_preprocessor_config.json": SLICES | {"video_processor_type": "MiniCPMV4_6VideoProcessor"},
        },
        MINICPM_TOKENS,
        {
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
            "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
        },
        modalities=("image", "video"),
    ),
    "qwen3_omni_moe": Published(
        {
            "processor_config.json": {"processor_class": "Qwen3OmniMoeProcessor"},
            "preprocessor_config.json": {
                "image_processor_type": "Qwen2VLImageProcessor", "feature_extractor_type": "WhisperFeatureExtractor",
                "processor_class": "Qwen3OmniMoeProcessor", "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
                "min_pixels": 64, "max_pixels": 2304, "feature_size": 16, "n_fft": 400, "hop_length": 160,
                "sampling_rate": 16000, "chunk_length": 30, "padding_value": 0.0, "return_attention_mask": True,
            },
            "video_preprocessor_config.json": {
                "video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4, "temporal_patch_size": 2,
                "merge_size": 2, "min_pixels": 64, "max_pixels": 2304,
            },
        },
        OMNI_TOKENS,
        {
            "audio_token": "<|audio_pad|>", "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
            "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
        },
        prefix="thinker.", sized=True, modalities=("image", "video", "audio"),
    ),
}  # fmt: skip


class InternVLChatConfig(transformers.PretrainedConfig):
    """What such a checkpoint's code makes of its config."""

    model_type = "internvl_chat"

    def __init__(self, vision_config: Any = None, llm_config: Any = None, **kwargs: Any) -> None:
        self.vision_config = transformers.PretrainedConfig(**(vision_config or {}))
        self.text_config = transformers.Qwen2Config(**(llm_config or {}))
        super().__init__(**kwargs)


def write(path: Path, name: str) -> None:
    """Write a checkpoint of towers with a tokenizer and a processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    published = FAMILIES[name]
    config = json.loads((CONFIGS / f"{name}.json").read_text().replace(": 512", ": 4096")) | published.changes
    (path / "config.json").write_text(json.dumps(config))
    family = import_module(f"metal_models.multimodal.families.{name}").Family
    parts: Any = build(family.package, family.vlm_config(config), family.sub_configs).parts(family.part_names)
    if published.sized:
        family.adapt(parts, config)
    arrays: Any = tree_flatten(parts.parameters())
    tensors = {f"{published.prefix}{key}": array for key, array in arrays}
    mx.save_safetensors(str(path / "model.safetensors"), tensors, metadata={"format": "mlx"})
    words = {i: f"w{i}" for i in range(VOCAB)} | {0: "<unk>", 1: "<s>", 2: "</s>"} | published.tokens
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *published.tokens.values()])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "extra_special_tokens": published.named,
    }  # fmt: skip
    for file, content in (published.files | {"tokenizer_config.json": settings}).items():
        (path / file).write_text(json.dumps(content))


@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_rows_as_placeholders(name: str, tmp_path: Path) -> None:
    from vllm.config import ModelConfig
    from vllm.config.multimodal import AudioDummyOptions, ImageDummyOptions, VideoDummyOptions
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import TimingContext
    from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig

    # Stand for the code that such checkpoints bring for their configs.
    transformers.AutoConfig.register("internvl_chat", InternVLChatConfig, exist_ok=True)
    transformers.AutoConfig.register("dots_ocr", DotsOCRConfig, exist_ok=True)
    write(tmp_path, name)
    modalities = FAMILIES[name].modalities
    limits = dict.fromkeys(modalities, 2)
    model = ModelConfig(model=str(tmp_path), max_model_len=4096, dtype="float32", limit_mm_per_prompt=limits)
    processor = MULTIMODAL_REGISTRY.create_processor(model)
    towers = load_towers(tmp_path, read_config(tmp_path))
    assert towers.modalities == set(modalities)
    options = {
        "image": ImageDummyOptions(count=2, width=60, height=36),
        "video": VideoDummyOptions(count=2, num_frames=4, width=32, height=32),
        "audio": AudioDummyOptions(count=2, length=20000),
    }
    for modality in modalities:
        inputs = processor.get_dummy_inputs(seq_len=4096, mm_counts={modality: 2}, mm_options=options)
        made = processor.apply(inputs, timing_ctx=TimingContext(enabled=False))
        for place, data in zip(made["mm_placeholders"][modality], made["mm_kwargs"][modality], strict=True):
            item = placed_item(modality, place, data)
            assert towers.encode(item).shape[0] == item.num_embeds
        tokens = made["prompt_token_ids"]
        assert len(tokens) > sum(place.length for place in made["mm_placeholders"][modality]) - 1
