"""Each family of image models through the whole engine, with vLLM's processors: tokens must be transformers'."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

pytest.importorskip("mlx_vlm")
pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

PROCESSORS = Path(__file__).parent / "processors"
CONFIGS = Path(__file__).parents[2] / "metal-models" / "tests" / "configs_multimodal"
VOCAB, IMAGE = 128, 120
NEW_TOKENS = 6
# What transformers' models take of what its processors make.
PIXELS = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_position_ids",
)
# One of each way that images get into a prompt and a language model; the others are left to the night.
QUICK = {
    "cohere2_vision",
    "gemma3",
    "gemma4_unified",
    "glm4v",
    "lfm2_vl",
    "llama4",
    "llava_onevision",
    "pixtral",
    "qwen3_5",
}
# Too few blocks for eight prompts: several kinds of caches need more.
BLOCKS = dict.fromkeys(("cohere2_vision", "gemma3", "gemma4", "gemma4_unified", "llama4"), 90)


def families(*, with_video: bool = False) -> list[Any]:
    """Return the names in ``processors``, those that are not quick marked so."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(PROCESSORS.glob("*.json"))}
    names = [name for name, settings in found.items() if "video" in settings or not with_video]
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


Prompt = tuple[list[int], list[Image.Image]]


class Family:
    """A tiny checkpoint as transformers writes it, with a tokenizer and a processor, and its model there.

    ``processors/<name>.json`` has what the processor is made of, the words of its tokens, and what stands for an image
    or a video in a prompt; metal-models' tests have the config.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.settings = json.loads((PROCESSORS / f"{name}.json").read_text())
        self.tokens: dict[int, str] = {int(token): word for token, word in self.settings["tokens"].items()}
        self.image: list[int] = self.settings["image"]
        self.video: list[int] | None = self.settings.get("video")
        self.unlikely = [0, 1, 2, *self.tokens]
        self.model = self._write_model()
        self._write_processor()
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(directory)

    def _write_model(self) -> Any:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = json.loads((CONFIGS / f"{self.name}.json").read_text())
        for key, value in self.settings["config"].items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                scaled = 0.2 * noise if parameter.ndim < 2 else noise * (1.5 / parameter[0].numel() ** 0.5)
                parameter.copy_(parameter + scaled if parameter.ndim < 2 else scaled)
        model.save_pretrained(self.directory)
        return model

    def _write_processor(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {0: "<unk>", 1: "<s>", 2: "</s>"} | {i: f"w{i}" for i in range(3, VOCAB)} | self.tokens
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *self.tokens.values()])
        tokenizer.save(str(self.directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "pad_token": "<unk>", "extra_special_tokens": self.settings["named"],
        }  # fmt: skip
        for name, content in {"tokenizer_config.json": settings, **self.settings["files"]}.items():
            (self.directory / name).write_text(json.dumps(content))

    def expected(self, output: Any, pixels: dict[str, Any], types: torch.Tensor) -> list[int]:
        """Return what transformers' model says after the prompt and after each token of the answer but the last."""
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        kinds = torch.zeros_like(ids)
        kinds[0, : len(types)] = types
        mask: Any = torch.ones_like(ids)
        if self.name == "gemma4_unified":
            # transformers' forward masks layers without a window, too; its generate does not, as vLLM.
            rows = torch.zeros(*ids.shape, 1)
            mask = self.model.create_masks_for_generate(self.model.config, rows, None, None, None, kinds)
        given = {"attention_mask": mask, "mm_token_type_ids": kinds, "token_type_ids": kinds}
        with torch.no_grad():
            logits = self.model(input_ids=ids, **given, **pixels).logits[0, len(output.prompt_token_ids) - 1 : -1]
        logits[:, self.unlikely] -= 100
        return [int(token) for token in logits.argmax(-1)]

    def check(self, output: Any, images: Sequence[Image.Image]) -> None:
        made = self.image_processor(images=list(images), return_tensors="pt") if images else {}
        pixels = {name: made[name] for name in PIXELS if name in made}
        pixels = {name: each.float() if each.is_floating_point() else each for name, each in pixels.items()}
        types = (torch.tensor(output.prompt_token_ids) == IMAGE).long()
        assert list(output.outputs[0].token_ids) == self.expected(output, pixels, types)

    def frames(self, data: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return what transformers' model takes of a video that vLLM's processor has made."""
        pixels = data["pixel_values_videos"]
        if "video_grid_thw" in data:
            return {"pixel_values_videos": pixels, "video_grid_thw": data["video_grid_thw"][None]}
        if "pixel_position_ids_videos" not in data:
            return {"pixel_values_videos": pixels[None]}
        # transformers 5.19 forgets to count the frames itself.
        found = self.model.model.get_video_features(
            pixel_values_videos=pixels,
            video_position_ids=data["pixel_position_ids_videos"],
            num_frames_per_video=torch.tensor([len(pixels)]),
        )
        return {"mm_encoder_outputs": {"video": found}}


@pytest.fixture(scope="module", params=families())
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llm(family: Family) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        gc.freeze()
        engine = LLM(**options(family))
    yield engine
    engine.llm_engine.engine_core.shutdown()


def options(family: Family, **others: Any) -> dict[str, Any]:
    """Return an engine's options; its steps are shorter than prompts, and than images that need not stay whole."""
    size = {"width": 40, "height": 40}
    video = size | {"count": 1 if family.video else 0, "num_frames": 2}
    settings: dict[str, Any] = {
        "model": str(family.directory),
        "max_model_len": 192,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 160 if family.name.startswith("gemma4") else 24,
        "block_size": 8,
        "kv_cache_memory_bytes": 16 << 20,
        "limit_mm_per_prompt": {"image": size | {"count": 3}, "video": video, "audio": 0},
    }
    return settings | others


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def greedy(family: Family, max_tokens: int) -> SamplingParams:
    bias = dict.fromkeys(family.unlikely, -100.0)
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logit_bias=bias)


def ask(llm: LLM, family: Family, prompts: Sequence[Prompt], max_tokens: int = NEW_TOKENS) -> list[Any]:
    """Return the answers, each checked."""
    inputs = [
        {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": images}} if images else {})
        for tokens, images in prompts
    ]
    outputs = llm.generate(inputs, greedy(family, max_tokens), use_tqdm=False)
    for output, (_, images) in zip(outputs, prompts, strict=True):
        family.check(output, images)
    return list(outputs)


def worker_of(llm: LLM) -> Any:
    core: Any = llm.llm_engine.engine_core
    return core.engine_core.model_executor.driver_worker.worker


def encoded(llm: LLM) -> list[Any]:
    """Return a list that grows by each item that is encoded from now on."""
    cache = worker_of(llm).multimodal.encoder_cache
    encode, seen = cache.encode, []

    def watching(item: Any) -> Any:
        seen.append(item)
        return encode(item)

    cache.encode = watching
    return seen


def test_images_beside_text(family: Family, llm: LLM) -> None:
    """In batches and pieces, again with prompts found in the cache, and with another image in the place of one."""
    one = family.image
    prompts: list[Prompt] = [
        ([1, *range(20, 30), *one, 40, 50], [picture(0, 24, 32)]),
        ([1, *range(40, 80)], []),
        ([*one, 33, *one, 34, 35], [picture(1, 32, 16), picture(2, 40, 24)]),
        ([1, *range(60, 75), *one], [picture(3, 40, 40)]),
    ]
    cold, warm = ask(llm, family, prompts), ask(llm, family, prompts)
    assert [output.num_cached_tokens for output in cold] == [0, 0, 0, 0]
    assert all(output.num_cached_tokens for output in warm[1:])
    [other] = ask(llm, family, [(prompts[0][0], [picture(4, 24, 32)])])
    assert other.prompt_token_ids == cold[0].prompt_token_ids
    assert other.num_cached_tokens <= 11


def test_an_image_is_encoded_once(family: Family, llm: LLM) -> None:
    seen = encoded(llm)
    again = [picture(5, 24, 24)]
    ask(llm, family, [([1, *range(20 + i), *family.image, 30], again) for i in range(3, 5)])
    assert len(seen) == 1


@pytest.mark.parametrize("family", families(with_video=True), indirect=True)
def test_video(family: Family, llm: LLM) -> None:
    """In pieces; pixels are what the encoder got."""
    seen = encoded(llm)
    count = 2 if family.name.startswith("gemma4") else 4
    frames = np.stack([np.asarray(picture(10 + i, 24, 32)) for i in range(count)])
    facts = {"fps": 1.0, "frames_indices": list(range(count)), "total_num_frames": count, "duration": float(count)}
    facts["do_sample_frames"] = False
    assert family.video is not None
    prompt = {"prompt_token_ids": [1, 20, *family.video, 30, 31], "multi_modal_data": {"video": [(frames, facts)]}}
    [output] = llm.generate([prompt], greedy(family, NEW_TOKENS), use_tqdm=False)
    [item] = seen
    given = {name: torch.from_numpy(np.array(item.data[name])) for name in item.data}
    types = torch.zeros(len(output.prompt_token_ids), dtype=torch.long)
    types[item.embed_positions] = 2
    assert list(output.outputs[0].token_ids) == family.expected(output, family.frames(given), types)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "text-only-compat"])
def test_language_model_alone(
    family: Family, make_engine: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Without memory for a tower: where no image is allowed, or none is wanted."""
    monkeypatch.setenv("VLLM_METAL_MULTIMODAL_MODE", mode)
    limits = {"image": 0, "audio": 0} if mode == "auto" else {}
    settings = options(family, limit_mm_per_prompt=limits)
    llm = make_engine(settings.pop("model"), **settings)
    assert worker_of(llm).towers is None
    ask(llm, family, [([1, *range(40, 80)], [])])
    with pytest.raises(ValueError, match="text"):
        ask(llm, family, [([1, *family.image], [picture(0, 24, 32)])])


def test_steps_hold_the_largest_input(tmp_path: Path) -> None:
    """All 32 frames of Gemma 4, with 78 tokens each, although steps of a server have 2,048 unless told otherwise."""
    family = Family("gemma4_unified", tmp_path)
    made = EngineArgs(**options(family, limit_mm_per_prompt={}, max_num_batched_tokens=2048)).create_engine_config()
    assert made.scheduler_config.max_num_batched_tokens == 32 * 78


# Qwen3.5's few, large blocks leave nothing to preempt; LFM2-VL has recurrent layers, too.
@pytest.mark.slow
@pytest.mark.parametrize("family", [each for each in families() if each.values[0] != "qwen3_5"], indirect=True)
def test_preempted_requests_see_their_images_again(family: Family, make_engine: Callable[..., LLM]) -> None:
    settings = options(family, num_gpu_blocks_override=BLOCKS.get(family.name, 30), max_model_len=128)
    llm = make_engine(settings.pop("model"), **settings)
    core: Any = llm.llm_engine.engine_core
    scheduler = core.engine_core.scheduler
    schedule, preempted = scheduler.schedule, set()

    def watching(*args: Any) -> Any:
        output = schedule(*args)
        preempted.update(output.preempted_req_ids or ())
        return output

    scheduler.schedule = watching
    prompts = [([1, *range(20, 35), *family.image, 36 + i], [picture(20 + i, 24, 32)]) for i in range(8)]
    ask(llm, family, prompts, max_tokens=40)
    assert preempted
