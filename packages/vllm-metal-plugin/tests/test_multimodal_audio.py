"""Sound, images and text through vLLM's engine, in process, over a tiny random Gemma 4."""

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm import LLM, SamplingParams

pytest.importorskip("mlx_vlm")
transformers = pytest.importorskip("transformers")

VOCAB = 160
TOKENS = {
    3: "<|audio|>", 4: "<|audio>", 5: "<audio|>", 6: "<|image|>", 7: "<|image>", 8: "<image|>", 9: "<|video|>",
}  # fmt: skip
AUDIO, IMAGE = 3, 6
ROTARY = {
    "full_attention": {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}
CONFIG = {
    "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "vocab_size": VOCAB,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB, "sliding_window": 12, "use_bidirectional_attention": None,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": ROTARY,
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
        "position_embedding_size": 64, "default_output_length": 70,
    },
    "audio_config": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [128, 4],
        "conv_kernel_size": 3, "output_proj_dims": 32, "attention_chunk_size": 4, "attention_context_left": 5,
    },
    "audio_token_id": AUDIO, "boa_token_id": 4, "eoa_token_id": 5, "image_token_id": IMAGE, "boi_token_id": 7,
    "eoi_token_id": 8, "video_token_id": 9,
}  # fmt: skip
PIXELS = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
PROCESSOR = {
    "processor_class": "Gemma4Processor", "image_seq_length": 70, "audio_seq_length": 100, "audio_ms_per_token": 40,
    "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    "image_processor": {"image_processor_type": "Gemma4ImageProcessor"} | PIXELS,
    "video_processor": {"video_processor_type": "Gemma4VideoProcessor"} | PIXELS,
}  # fmt: skip
UNLIKELY = dict.fromkeys(range(10), -100.0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logit_bias=UNLIKELY)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers writes it, with a tokenizer and a processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny-gemma4")
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration(transformers.AutoConfig.for_model(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            scaled = 0.2 * noise if parameter.ndim < 2 else noise * (1.5 / parameter[0].numel() ** 0.5)
            parameter.copy_(parameter + scaled if parameter.ndim < 2 else scaled)
    model.save_pretrained(path)
    words = {0: "<pad>", 1: "<bos>", 2: "<eos>"} | TOKENS | {i: f"w{i}" for i in range(10, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>", *TOKENS.values()])
    tokenizer.save(str(path / "tokenizer.json"))
    names = ("audio_token", "boa_token", "eoa_token", "image_token", "boi_token", "eoi_token")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "extra_special_tokens": dict(zip(names, TOKENS.values(), strict=False)),
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "processor_config.json").write_text(json.dumps(PROCESSOR))
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        engine = LLM(
            model=str(directory),
            max_model_len=192,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            block_size=8,
            kv_cache_memory_bytes=16 << 20,
            limit_mm_per_prompt={"audio": 3, "image": 1, "video": 0},
        )
    yield engine
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()


def sound(seed: int, milliseconds: int) -> tuple[np.ndarray, int]:
    samples = np.random.default_rng(seed).normal(0, 0.1, 16 * milliseconds)
    return samples.astype(np.float32), 16_000


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(9).integers(0, 256, (32, 48, 3), dtype=np.uint8))


class Reference:
    """transformers' model and its own processors."""

    def __init__(self, directory: Path) -> None:
        # Not with eager attention, which takes the audio encoder's mask the wrong way round.
        self.model = transformers.Gemma4ForConditionalGeneration.from_pretrained(directory)
        self.processor = transformers.AutoProcessor.from_pretrained(directory)

    def tokens(self, prompt: Sequence[int], data: dict[str, Any]) -> list[int]:
        """Generate greedily, with a forward pass over everything for each token."""
        given: dict[str, Any] = {}
        if "audio" in data:
            samples = [array for array, _ in data["audio"]]
            given |= self.processor.feature_extractor(samples, sampling_rate=16_000, return_tensors="pt")
        if "image" in data:
            seen = self.processor.image_processor(data["image"], return_tensors="pt")
            given |= {name: seen[name] for name in ("pixel_values", "image_position_ids")}
        tokens = list(prompt)
        for _ in range(6):
            ids = torch.tensor([tokens])
            types = torch.where(ids == AUDIO, 3, torch.where(ids == IMAGE, 1, 0))
            mask = torch.ones_like(ids)
            with torch.no_grad():
                logits = self.model(input_ids=ids, mm_token_type_ids=types, attention_mask=mask, **given).logits[0, -1]
            tokens.append(10 + int(logits[10:].argmax()))
        return tokens[len(prompt) :]


def test_sound_beside_text_and_images(llm: LLM, directory: Path) -> None:
    """Several in a prompt, in batches and pieces; then prefixes are found by what they hold."""
    reference = Reference(directory)
    short, long, other = sound(0, 300), sound(1, 810), sound(2, 810)
    asked: list[tuple[list[int], dict[str, Any]]] = [
        ([1, *range(20, 32), AUDIO, 40, 50], {"audio": [short]}),
        ([1, *range(20, 60)], {}),
        ([1, AUDIO, 33, AUDIO, 34, AUDIO, 35], {"audio": [long, short, other]}),
        ([1, *range(60, 75), IMAGE, 21, AUDIO], {"audio": [long], "image": [picture()]}),
        ([1, AUDIO, 33], {"audio": [other]}),
    ]
    cold = generate(llm, asked[:4])
    warm = generate(llm, asked)
    expected = [reference.tokens(output.prompt_token_ids, data) for output, (_, data) in zip(warm, asked, strict=True)]
    assert [list(output.outputs[0].token_ids) for output in warm] == expected
    assert [list(output.outputs[0].token_ids) for output in cold] == expected[:4]
    # The last prompt begins like the third, but with another sound.
    assert [output.num_cached_tokens > 0 for output in warm] == [True, True, True, True, False]


def test_the_same_sound_is_encoded_once(llm: LLM) -> None:
    core: Any = llm.llm_engine.engine_core
    cache = core.engine_core.model_executor.driver_worker.worker.multimodal.encoder_cache
    encode, seen = cache.encode, []

    def watching(item: Any) -> Any:
        seen.append(item)
        return encode(item)

    cache.encode = watching
    generate(llm, [([1, 20 + i, AUDIO, 30], {"audio": [sound(3, 500)]}) for i in range(3)])
    assert [item.modality for item in seen] == ["audio"]


def generate(llm: LLM, asked: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Any]:
    inputs = [{"prompt_token_ids": tokens, "multi_modal_data": data} for tokens, data in asked]
    return list(llm.generate(inputs, GREEDY, use_tqdm=False))
