"""What vLLM's processors make of images and video is what the towers of each family take, row for row."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from metal_models.checkpoint import read_config
from metal_models.multimodal import load_towers
from vllm_metal_plugin.multimodal.items import placed_item

pytest.importorskip("mlx_vlm")
transformers = pytest.importorskip("transformers")

VOCAB = 160
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 512,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
SQUARE = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint: its config, its processor's files, and the names of its tokens from number 3 on."""

    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    tokens: list[str]
    named: dict[str, str] = field(default_factory=dict)
    modalities: tuple[str, ...] = ("image",)


FAMILIES = {
    "llava_next": Family(
        {
            "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
            "text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP | {"model_type": "clip_vision_model"},
            "image_token_index": 3, "image_grid_pinpoints": PINPOINTS,
        },
        {
            "processor_config.json": {
                "processor_class": "LlavaNextProcessor", "patch_size": 4, "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            },
            "preprocessor_config.json": {
                "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS,
                "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16},
            },
        },
        ["<image>"],
        {"image_token": "<image>"},
    ),
    "llava_onevision": Family(
        {
            "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
            "text_config": TEXT | {"model_type": "qwen2"}, "vision_config": SIGLIP, "image_token_index": 3,
            "video_token_index": 4, "image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        },
        {
            "processor_config.json": {
                "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16,
                "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
            },
            "preprocessor_config.json": {
                "image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": PINPOINTS,
                "size": {"height": 16, "width": 16},
            },
            "video_preprocessor_config.json": {
                "video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 16, "width": 16},
            },
        },
        ["<image>", "<video>"],
        {"image_token": "<image>", "video_token": "<video>"},
        ("image", "video"),
    ),
    "pixtral": Family(
        {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 3,
            "text_config": TEXT | {"model_type": "mistral"}, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_config": CLIP | {"model_type": "pixtral", "head_dim": 16, "image_size": 64, "hidden_act": "silu"},
        },
        {
            "processor_config.json": {"processor_class": "PixtralProcessor", "patch_size": 4},
            "preprocessor_config.json": {
                "image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 4, "width": 4},
                "size": {"longest_edge": 64},
            },
        },
        ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    ),
    "llama4": Family(
        {
            "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "image_token_index": 3,
            "boi_token_index": 4, "eoi_token_index": 5,
            "text_config": TEXT | {
                "model_type": "llama4_text", "intermediate_size_mlp": 48, "num_local_experts": 2,
                "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
            },
            "vision_config": CLIP | {
                "model_type": "llama4_vision_model", "intermediate_size": 128, "pixel_shuffle_ratio": 0.5,
                "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            },
        },
        {
            "processor_config.json": {
                "processor_class": "Llama4Processor", "patch_size": 4, "pixel_shuffle_ratio": 0.5,
            },
            "preprocessor_config.json": {
                "image_processor_type": "Llama4ImageProcessorFast", "max_patches": 4, "resize_to_max_canvas": False,
            } | SQUARE,
        },
        ["<|patch|>", "<|image_start|>", "<|image_end|>", "<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"],
    ),
}  # fmt: skip


def write(path: Path, family: Family) -> None:
    """Write a checkpoint as transformers does, with a tokenizer and a processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**family.config)
    getattr(transformers, family.config["architectures"][0])(config).save_pretrained(path)
    words = ["<unk>", "<s>", "</s>", *family.tokens]
    words += [f"w{i}" for i in range(len(words), VOCAB)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *family.tokens])
    tokenizer.save(str(path / "tokenizer.json"))
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings = common | {"extra_special_tokens": family.named, "pad_token": "<unk>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in family.files.items():
        (path / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_rows_as_placeholders(name: str, tmp_path: Path) -> None:
    from vllm.config import ModelConfig
    from vllm.config.multimodal import ImageDummyOptions
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import TimingContext

    family = FAMILIES[name]
    write(tmp_path, family)
    limits = dict.fromkeys(family.modalities, 2)
    model = ModelConfig(model=str(tmp_path), max_model_len=512, dtype="float32", limit_mm_per_prompt=limits)
    processor = MULTIMODAL_REGISTRY.create_processor(model)
    towers = load_towers(tmp_path, read_config(tmp_path))
    for modality in family.modalities:
        options = {"image": ImageDummyOptions(count=2, width=60, height=36)}
        inputs = processor.get_dummy_inputs(seq_len=512, mm_counts={modality: 2}, mm_options=options)
        made = processor.apply(inputs, timing_ctx=TimingContext(enabled=False))
        for place, data in zip(made["mm_placeholders"][modality], made["mm_kwargs"][modality], strict=True):
            item = placed_item(modality, place, data)
            assert towers.encode(item).shape == (item.num_embeds, 32)
