"""Images and text through vLLM's engine, in process, over a tiny random Qwen2.5-VL: tokens must be transformers'."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from vllm_metal_plugin.multimodal.encoder_memory import measure_encoder

pytest.importorskip("mlx_vlm")
pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
START, END, IMAGE, VIDEO = 5, 6, 8, 9
VOCAB = 160
CONFIG = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "tie_word_embeddings": False,
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
PIXELS = {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "patch_size": 14,
    "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 784, "max_pixels": 28224,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
}  # fmt: skip
# Placeholders among sampled tokens would stand for images that transformers misses.
UNLIKELY = dict.fromkeys(range(len(SPECIAL)), -100.0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logit_bias=UNLIKELY)
LONG = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logit_bias=UNLIKELY)


def image(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


Prompt = tuple[list[int], list[Image.Image]]
Expected = Callable[..., list[int]]
ONE = [START, IMAGE, END]
PROMPTS: list[Prompt] = [
    ([1, 20, 30, *ONE, 40, 50], [image(0)]),
    ([1, *range(20, 60)], []),
    ([*ONE, 33, *ONE, 34, 35], [image(1, 112, 56), image(2, 56, 140)]),
    ([1, *range(60, 75), *ONE], [image(3, 112, 112)]),
]


@pytest.fixture(scope="module")
def vision_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers writes it, with a tokenizer and a processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("tiny-qwen2_5_vl")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CONFIG)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter[0].numel() ** 0.5))
    model.save_pretrained(directory)
    words = {word: i for i, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return directory


@pytest.fixture(scope="module")
def expected(vision_dir: Path) -> Expected:
    """Greedy tokens as transformers generates them, with a forward pass over everything for each token."""
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(vision_dir, attn_implementation="eager")
    known: dict[str, list[int]] = {}

    def cached(prompt: Prompt, max_tokens: int = 8) -> list[int]:
        key = str(prompt[0]) + str([each.tobytes()[:64] for each in prompt[1]]) + str(max_tokens)
        if key not in known:
            known[key] = greedy(model, vision_dir, prompt, max_tokens)
        return known[key]

    return cached


def greedy(model: Any, vision_dir: Path, prompt: Prompt, max_tokens: int) -> list[int]:
    processor = transformers.AutoImageProcessor.from_pretrained(vision_dir)
    tokens, images = prompt
    vision: dict[str, Any] = dict(processor(images=images, return_tensors="pt")) if images else {}
    grids = iter(vision.get("image_grid_thw", torch.zeros(0, 3)).prod(-1).tolist())
    full = [token for t in tokens for token in ([t] * (int(next(grids)) // 4) if t == IMAGE else [t])]
    start = len(full)
    for _ in range(max_tokens):
        ids = torch.tensor([full])
        with torch.no_grad():
            types = (ids == IMAGE).int()
            logits = model(input_ids=ids, mm_token_type_ids=types, **vision).logits[0, -1]
        full.append(len(SPECIAL) + int(logits[len(SPECIAL) :].argmax()))
    return full[start:]


@pytest.fixture
def engine(make_engine: Callable[..., LLM], vision_dir: Path) -> Callable[..., LLM]:
    """Engines over the tiny Qwen2.5-VL."""
    return partial(
        make_engine,
        vision_dir,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        block_size=8,
        kv_cache_memory_bytes=4 << 20,
        limit_mm_per_prompt={"image": 3, "video": 0},
    )


def ask(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams = GREEDY, **options: Any) -> list[Any]:
    inputs = [
        {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": images}} if images else {})
        for tokens, images in prompts
    ]
    return list(llm.generate(inputs, params, use_tqdm=False, **options))


def tokens_of(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def worker_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_mixed_batches_in_small_pieces(engine: Callable[..., LLM], expected: Expected, async_scheduling: bool) -> None:
    llm = engine(async_scheduling=async_scheduling)
    assert tokens_of(ask(llm, PROMPTS)) == [expected(prompt) for prompt in PROMPTS]


def test_prefixes_are_shared_by_image(engine: Callable[..., LLM], expected: Expected) -> None:
    llm = engine(max_num_batched_tokens=64)
    tokens = [1, *range(20, 35), *ONE, *range(40, 50)]
    first, other = (tokens, [image(4, 112, 112)]), (tokens, [image(5, 112, 112)])
    [cold] = ask(llm, [first])
    [hit] = ask(llm, [first])
    [miss] = ask(llm, [other])
    assert (cold.num_cached_tokens, hit.num_cached_tokens, miss.num_cached_tokens) == (0, 40, 16)
    assert tokens_of([cold, hit, miss]) == [expected(first), expected(first), expected(other)]
    assert expected(first) != expected(other)


def test_an_image_is_encoded_once(engine: Callable[..., LLM], expected: Expected) -> None:
    llm = engine(enable_prefix_caching=False)
    counted = count_encodes(llm)
    prompts: list[Prompt] = [([1, 20, *ONE, 30 + i], [image(6)]) for i in range(3)]
    assert tokens_of(ask(llm, prompts)) == [expected(prompt) for prompt in prompts]
    assert tokens_of(ask(llm, prompts[:1])) == [expected(prompts[0])]
    assert len(counted) == 1
    llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
    assert tokens_of(ask(llm, prompts[:1])) == [expected(prompts[0])]
    assert len(counted) == 2


def count_encodes(llm: LLM, fail: Callable[[int], bool] = lambda number: False) -> list[Any]:
    """Note what is encoded from now on; the runs that ``fail`` picks raise."""
    cache = worker_of(llm).multimodal.encoder_cache
    encode, seen = cache.encode, []

    def counting(item: Any) -> Any:
        seen.append(item)
        if fail(len(seen)):
            raise RuntimeError("[metal::malloc] Attempting to allocate too much")
        return encode(item)

    cache.encode = counting
    return seen


def test_more_images_than_the_encoder_cache_holds(engine: Callable[..., LLM], expected: Expected) -> None:
    llm = engine(enable_prefix_caching=False)
    prompts: list[Prompt] = [([1, *ONE, 30 + i], [image(10 + i, 112, 112)]) for i in range(6)]
    assert tokens_of(ask(llm, prompts)) == [expected(prompt) for prompt in prompts]
    # The scheduler's plan: no more outputs than it counts.
    cache = worker_of(llm).multimodal.encoder_cache
    assert cache.nbytes <= 48 * 64 * 4


def test_preempted_requests_see_their_images_again(engine: Callable[..., LLM], expected: Expected) -> None:
    """Also those whose images were covered by a prefix when they started, and are not when they resume."""
    llm = engine(num_gpu_blocks_override=14, max_model_len=64, max_num_seqs=3)
    prompts: list[Prompt] = [([1, *ONE, *range(30, 40)], [image(20 + i, 112, 112)]) for i in range(3)]
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, preempted, covered = scheduler.schedule, set(), set()

    def watching(*args: Any) -> Any:
        output = schedule(*args)
        preempted.update(output.preempted_req_ids or ())
        covered.update(new.req_id for new in output.scheduled_new_reqs if new.num_computed_tokens >= 24)
        return output

    scheduler.schedule = watching
    for prompt in reversed(prompts):
        ask(llm, [prompt])  # the last one's image has left the encoder cache after this, its prefix is still there
    assert tokens_of(ask(llm, prompts, LONG)) == [expected(prompt, LONG.max_tokens) for prompt in prompts]
    assert preempted & covered


def test_failed_encode_ends_its_request_alone(engine: Callable[..., LLM], expected: Expected) -> None:
    llm = engine(max_num_batched_tokens=64)
    count_encodes(llm, fail=lambda number: number == 1)
    failed, *others = ask(llm, PROMPTS)
    assert failed.outputs[0].finish_reason == "error"
    assert tokens_of(others) == [expected(prompt) for prompt in PROMPTS[1:]]
    assert tokens_of(ask(llm, PROMPTS)) == [expected(prompt) for prompt in PROMPTS]


def test_video(vision_dir: Path, engine: Callable[..., LLM]) -> None:
    """Coordinates in time go on by seconds; pixels are what the encoder got."""
    llm = engine(limit_mm_per_prompt={"image": 0, "video": 1})
    seen = count_encodes(llm)
    frames = np.stack([np.asarray(image(i, 84, 56)) for i in range(6)])
    facts = {"fps": 1.0, "frames_indices": list(range(6)), "total_num_frames": 6, "duration": 6.0}
    prompt = {"prompt_token_ids": [1, 20, START, VIDEO, END, 30], "multi_modal_data": {"video": [(frames, facts)]}}
    [output] = llm.generate([prompt], GREEDY, use_tqdm=False)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(vision_dir, attn_implementation="eager")
    [item] = seen
    given = {name: torch.from_numpy(np.array(item.data[name])) for name in item.data}
    vision = {"pixel_values_videos": given["pixel_values_videos"], "video_grid_thw": given["video_grid_thw"][None]}
    full = list(output.prompt_token_ids)
    times, rows, columns = given["video_grid_thw"].tolist()
    cells = np.indices((times, rows // 2, columns // 2)).reshape(3, -1)
    cells[0] *= int(4 * given["second_per_grid_ts"])  # four positions to a second
    assert full.count(VIDEO) == cells.shape[1]
    # As vLLM has it, and the model's first code: text goes on after the last position in time, too.
    later = cells.max() + 4
    for _ in range(8):
        after = np.arange(later, later + len(full) - 3 - cells.shape[1])
        places = [np.concatenate([np.arange(3), axis + 3, after]) for axis in cells]
        positions = torch.from_numpy(np.stack(places))[:, None]
        with torch.no_grad():
            types = 2 * (torch.tensor([full]) == VIDEO).int()
            answer = model(input_ids=torch.tensor([full]), mm_token_type_ids=types, position_ids=positions, **vision)
        full.append(len(SPECIAL) + int(answer.logits[0, -1, len(SPECIAL) :].argmax()))
    assert list(output.outputs[0].token_ids) == full[-8:]


def write_adapter(directory: Path, seed: int, target: str = "language_model.layers.{}.self_attn.q_proj") -> Path:
    """A random adapter of one kind of layer, named as PEFT names those of transformers' model."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for letter, shape in (("A", (4, 64)), ("B", (64, 4))):
            name = f"base_model.model.model.{target.format(layer)}.lora_{letter}.weight"
            tensors[name] = 0.4 * torch.randn(shape, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [], "layers_to_transform": [0, 1]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def merged(vision_dir: Path, adapter: Path) -> Any:
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(vision_dir, attn_implementation="eager")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += 2 * tensors[name.replace("lora_A", "lora_B")] @ a
    return model


def test_adapters_beside_images(
    engine: Callable[..., LLM], expected: Expected, vision_dir: Path, tmp_path: Path
) -> None:
    """Several in one batch, and again with prefixes found in the cache, each adapter's its own."""
    llm = engine(enable_lora=True, max_loras=2, max_lora_rank=8)
    requests, models = [], []
    for number in (1, 2):
        adapter = write_adapter(tmp_path / str(number), number)
        requests.append(LoRARequest(f"adapter{number}", number, str(adapter)))
        models.append(merged(vision_dir, adapter))
    one, text, two, _ = PROMPTS
    asked = [(one, 0), (one, 1), (two, 2), (text, 1), (two, 0), (one, 2)]
    answers = [expected(prompt) if not n else greedy(models[n - 1], vision_dir, prompt, 8) for prompt, n in asked]
    assert len({str(answers[place]) for place in (0, 1, 5)}) == 3
    adapters = [requests[n - 1] if n else None for _, n in asked]
    for _ in range(2):
        assert tokens_of(ask(llm, [prompt for prompt, _ in asked], lora_request=adapters)) == answers
    wrong = write_adapter(tmp_path / "encoder", 3, "visual.blocks.{}.attn.proj")
    [failed] = ask(llm, [one], lora_request=[LoRARequest("encoder", 3, str(wrong))])
    assert failed.outputs[0].finish_reason == "error"
    assert tokens_of(ask(llm, [one])) == [answers[0]]


def test_abort_while_a_step_is_in_flight(engine: Callable[..., LLM], expected: Expected) -> None:
    core = engine().llm_engine
    for name, (tokens, images) in zip(("gone", "stays"), (PROMPTS[3], PROMPTS[0]), strict=True):
        core.add_request(name, {"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}, GREEDY)
    core.step()
    core.abort_request(["gone"])
    finished = {}
    while core.has_unfinished_requests():
        finished |= {out.request_id: out for out in core.step() if out.finished}
    assert list(finished["stays"].outputs[0].token_ids) == expected(PROMPTS[0])


def test_encoders_are_planned_for(engine: Callable[..., LLM]) -> None:
    llm = engine(kv_cache_memory_bytes=None, max_num_batched_tokens=32)
    worker = worker_of(llm)
    assert tokens_of(ask(llm, PROMPTS[:1]))
    whole = measure_encoder(worker.towers, llm.llm_engine.vllm_config, on_cpu=False)
    scaled = measure_encoder(worker.towers, llm.llm_engine.vllm_config, on_cpu=True)
    # 28,224 pixels at most: 36 tokens of 64 float32 numbers, of 4 patches of 1,176 numbers each.
    assert whole.cache_bytes == scaled.cache_bytes == 36 * 64 * 4
    assert whole.run_bytes >= 36 * 4 * 1176 * 4
    assert scaled.run_bytes >= whole.run_bytes // 2
    encode, calls = worker.towers.encode, []

    def too_large_at_first(item: Any) -> Any:
        calls.append(item)
        if len(calls) == 1:
            raise RuntimeError("[metal::malloc] Attempting to allocate too much")
        return encode(item)

    worker.towers.encode = too_large_at_first
    rest = measure_encoder(worker.towers, llm.llm_engine.vllm_config, on_cpu=False)
    assert rest.run_bytes > 0
    assert rest.cache_bytes == whole.cache_bytes


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("auto", {"limit_mm_per_prompt": {"image": 0}}),
        ("text-only-compat", {}),
        ("auto", {"language_model_only": True}),
    ],
)
def test_language_model_alone(
    engine: Callable[..., LLM],
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.setenv("VLLM_METAL_MULTIMODAL_MODE", mode)
    llm = engine(**options)
    assert worker_of(llm).towers is None
    assert tokens_of(ask(llm, PROMPTS[1:2])) == [expected(PROMPTS[1])]
    with pytest.raises(ValueError, match="text"):
        ask(llm, PROMPTS[:1])
