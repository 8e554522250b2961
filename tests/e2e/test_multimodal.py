"""A small vision model behind the real server: images through the chat API get the tokens of mlx-vlm's own model."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import openai
import pytest
from live_server import serving
from mlx.utils import tree_flatten, tree_map
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from vllm_metal_hub.testing import FaultServer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
IMAGE = 8
VOCAB = 160
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {
        "model_type": "qwen3_vl_text", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": VOCAB, "image_token_id": IMAGE,
    "video_token_id": 9, "vision_start_token_id": 5, "vision_end_token_id": 6,
}  # fmt: skip
PIXELS = {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor", "patch_size": 14,
    "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 784, "max_pixels": 28224,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
}  # fmt: skip
TEMPLATE = """{% for message in messages %}<|im_start|> {% if message['content'] is string %}{{ message['content'] }}
{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %} {{ part['text'] }} {% else %}
<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}<|im_start|>"""
FLAGS = ("--served-model-name", "tiny", "--max-model-len", "192", "--max-num-batched-tokens", "32",
         "--kv-cache-memory-bytes", "4194304", "--limit-mm-per-prompt", '{"image": 2, "video": 0}')  # fmt: skip


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def part(image: Image.Image) -> dict[str, Any]:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def model() -> Any:
    """mlx-vlm's, with random weights."""
    from metal_models.multimodal.mlx_vlm_models import build

    mx.random.seed(3)
    module = build("qwen3_vl", CONFIG).module
    module.update(
        tree_map(lambda a: mx.random.normal(a.shape) / a[0].size ** 0.5 if a.ndim > 1 else a, module.parameters())
    )
    mx.eval(module.parameters())
    return module


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny")
    words = {word: i for i, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    (path / "config.json").write_text(json.dumps(CONFIG))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path


@pytest.fixture(scope="module")
def hub(directory: Path) -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.add("org/tiny", {file.name: file.read_bytes() for file in directory.iterdir()})
        yield server


@pytest.fixture(scope="module")
def client(hub: FaultServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    home = tmp_path_factory.mktemp("home")
    variables = hub.environment(home) | {"HF_HUB_OFFLINE": "0", "VLLM_METAL_HUB_TIMEOUT": "20"}
    with serving("org/tiny", home / "log", *FLAGS, **variables) as running, running.client() as connected:
        yield connected


def ask(client: openai.OpenAI, *content: dict[str, Any]) -> Any:
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": list(content)}],  # type: ignore[list-item, misc]
        max_tokens=8,
        temperature=0,
        # Placeholders among sampled tokens would stand for images that mlx-vlm misses.
        logit_bias={str(token): -100 for token in range(len(SPECIAL))},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )


def expected(model: Any, directory: Path, prompt: Sequence[int], images: Sequence[Image.Image]) -> list[int]:
    """Greedy tokens of mlx-vlm's model, with a forward pass over everything for each token."""
    from transformers import AutoImageProcessor

    vision: dict[str, Any] = {}
    if images:
        processor = AutoImageProcessor.from_pretrained(directory)
        vision = {name: mx.array(v.numpy()) for name, v in processor(images=list(images), return_tensors="pt").items()}
        merged = int(mx.prod(vision["image_grid_thw"], axis=1).sum().item()) // 4
        assert list(prompt).count(IMAGE) == merged
    tokens = list(prompt)
    for _ in range(8):
        inputs = model.get_input_embeddings(mx.array([tokens]), **vision)
        given = {name: value for name, value in vars(inputs).items() if value is not None and name != "rope_deltas"}
        logits = model.language_model(mx.array([tokens]), **given).logits[0, -1]
        tokens.append(len(SPECIAL) + int(mx.argmax(logits[len(SPECIAL) :]).item()))
    return tokens[len(prompt) :]


IMAGES = [picture(0, 84, 56), picture(1, 112, 140)]


@pytest.mark.parametrize("images", [IMAGES[:1], IMAGES, []], ids=["one", "two", "none"])
def test_tokens_are_mlx_vlms(client: openai.OpenAI, model: Any, directory: Path, images: list[Image.Image]) -> None:
    answer = ask(client, text("w20 w21"), *(part(image) for image in images), text("w30 w31 w32"))
    prompt = answer.prompt_token_ids
    assert answer.choices[0].token_ids == expected(model, directory, prompt, images)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        [part(image) for image in [*IMAGES, *IMAGES]],
    ],
    ids=["no image", "too many"],
)
def test_bad_image_gets_400_and_the_server_lives(client: openai.OpenAI, content: list[dict[str, Any]]) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, *content)
    assert len(ask(client, text("w20")).choices[0].token_ids) == 8


def test_only_the_fetching_process_asks_the_hub(client: openai.OpenAI, hub: FaultServer) -> None:
    ask(client, part(IMAGES[1]))
    assert "preprocessor_config.json" in {request.path.rpartition("/")[2] for request in hub.requests}
    assert [r.command for r in hub.requests if "vllm_metal_hub.fetch" not in r.command] == []


def test_language_model_alone(model: Any, directory: Path, tmp_path: Path) -> None:
    with (
        serving(directory, tmp_path / "log", *FLAGS, VLLM_METAL_MULTIMODAL_MODE="text-only-compat") as running,
        running.client() as client,
    ):
        with pytest.raises(openai.BadRequestError, match="text only, no image: VLLM_METAL_MULTIMODAL_MODE"):
            ask(client, part(IMAGES[0]))
        answer = ask(client, text("w20 w21"))
        assert answer.choices[0].token_ids == expected(model, directory, answer.prompt_token_ids, [])
    assert "language model alone" in (tmp_path / "log").read_text()
