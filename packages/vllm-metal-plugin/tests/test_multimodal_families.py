"""Families that ask for more: image tokens that see each other (Gemma 3), recurrent layers beside M-RoPE (Qwen3.5)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm import LLM, SamplingParams

pytest.importorskip("mlx_vlm")
pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

VOCAB, IMAGE, VIDEO, START, END = 128, 120, 121, 122, 123
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
NORMALISED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class Family:
    """A tiny model, how its processor is set up, and what transformers wants to know of image tokens."""

    config: dict[str, Any]
    tokens: dict[int, str]
    files: dict[str, dict[str, Any]]
    types: str
    image: tuple[int, ...]


FAMILIES = {
    "gemma3": Family(
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "text_config": TEXT | {
                "num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 12,
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                },
            },
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 2,
            },
            "tie_word_embeddings": False, "vocab_size": VOCAB, "mm_tokens_per_image": 16, "image_token_index": IMAGE,
            "boi_token_index": START, "eoi_token_index": END,
        },
        {
            3: "\n", 4: "\n\n", 5: "\n\n\n", 6: "\n\n\n\n", IMAGE: "<image_soft_token>", START: "<start_of_image>",
            END: "<end_of_image>",
        },
        {
            "tokenizer_config.json": {
                "extra_special_tokens": {
                    "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                    "image_token": "<image_soft_token>",
                },
            },
            "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 16},
            "preprocessor_config.json": NORMALISED | {
                "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor",
                "size": {"height": 16, "width": 16}, "image_seq_length": 16,
            },
        },
        "token_type_ids",
        (START,),
    ),
    "qwen3_5": Family(
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
            "text_config": TEXT | {
                "num_hidden_layers": 4,
                "rope_parameters": {
                    "rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                    "partial_rotary_factor": 0.5,
                },
                "layer_types": [*["linear_attention"] * 3, "full_attention"], "linear_num_value_heads": 4,
                "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                "linear_conv_kernel_dim": 4,
            },
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
            },
            "tie_word_embeddings": False, "image_token_id": IMAGE, "video_token_id": VIDEO,
            "vision_start_token_id": START, "vision_end_token_id": END,
        },
        {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"},
        {
            "tokenizer_config.json": {},
            "preprocessor_config.json": NORMALISED | {
                "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor",
                "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64, "max_pixels": 2304,
            },
        },
        "mm_token_type_ids",
        (START, IMAGE, END),
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture
def reference(family: Family, tmp_path: Path) -> Any:
    """The model in transformers, saved with a tokenizer and a processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**family.config)
    model = getattr(transformers, family.config["architectures"][0])(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.copy_(parameter + 0.2 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
    model.save_pretrained(tmp_path)
    words = {0: "<unk>", 1: "<s>", 2: "</s>"} | {i: f"w{i}" for i in range(3, VOCAB)} | family.tokens
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *family.tokens.values()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name, settings in family.files.items():
        added = common if name == "tokenizer_config.json" else {}
        (tmp_path / name).write_text(json.dumps(settings | added))
    return model


@pytest.fixture
def llm(reference: Any, tmp_path: Path, make_engine: Callable[..., LLM]) -> LLM:
    return make_engine(
        tmp_path,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=8,
        kv_cache_memory_bytes=16 << 20,
        limit_mm_per_prompt={"image": 3},
    )


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_tokens_are_those_of_transformers(family: Family, reference: Any, llm: LLM, tmp_path: Path) -> None:
    """In batches and pieces, and again with a part of every prompt found in the cache."""
    unlikely = [0, 1, 2, *family.tokens]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logit_bias=dict.fromkeys(unlikely, -100.0))
    one = family.image
    prompts = [
        ([1, 20, 30, *one, 40, 50], [picture(0, 24, 32)]),
        ([1, *range(20, 60)], []),
        ([*one, 33, *one, 34, 35], [picture(1, 32, 16), picture(2, 40, 24)]),
        ([1, *range(60, 75), *one], [picture(3, 48, 48)]),
    ]
    inputs = [
        {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": images}} if images else {})
        for tokens, images in prompts
    ]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    cold, warm = (llm.generate(inputs, params, use_tqdm=False) for _ in range(2))
    for (_, images), first, second in zip(prompts, cold, warm, strict=True):
        tokens = list(first.prompt_token_ids)
        pixels = dict(processor(images=images, return_tensors="pt")) if images else {}
        pixels.pop("num_crops", None)
        for _ in range(6):
            ids = torch.tensor([tokens])
            given = {family.types: (ids == IMAGE).long(), "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = reference(input_ids=ids, **given, **pixels).logits[0, -1].clone()
            logits[unlikely] -= 100
            tokens.append(int(logits.argmax()))
        expected = tokens[len(first.prompt_token_ids) :]
        assert list(first.outputs[0].token_ids) == expected
        assert list(second.outputs[0].token_ids) == expected
    assert all(output.num_cached_tokens for output in warm[1:])
