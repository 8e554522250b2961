"""Images, video and sound among text, in ragged batches, generate what transformers generates one prompt at a time."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_models import MetalModelsError, load
from metal_models.checkpoint import read_config
from metal_models.multimodal import MultimodalItem, has_towers, load_towers
from metal_models.multimodal.mlx_vlm_models import build as build_vlm

pytest.importorskip("mlx_vlm")
torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

NEW_TOKENS = 4
AUDIO, IMAGE, VIDEO, START, END = 119, 120, 121, 122, 123
TEXT_TOKENS = 110
RNG = np.random.default_rng(5)

CONFIGS = Path(__file__).parent / "configs_multimodal"


@dataclass
class Piece:
    """A part of a prompt: its tokens, and the item whose placeholders they hold."""

    tokens: list[int]
    modality: str = ""
    is_embed: list[bool] | None = None
    data: dict[str, np.ndarray] | None = None


@dataclass
class Case:
    """A family whose tiny config is in ``configs_multimodal``: how an image or a video of some size looks in a prompt.

    Transformers takes the items of a prompt joined, or stacked, some padded to be as long as the longest, and some
    under other names than vLLM.
    """

    image: Callable[[int, int], Piece]
    video: Callable[[int, int, int], Piece] | None = None
    audio: Callable[[], Piece] | None = None
    padded: set[str] = field(default_factory=set)
    listed: set[str] = field(default_factory=set)
    joined: set[str] = field(default_factory=lambda: {"pixel_values", "pixel_values_videos"})
    renamed: dict[str, str] = field(default_factory=dict)
    adjust: Callable[[dict[str, Any]], None] = lambda inputs: None
    published: "Published | None" = None


@dataclass
class Published:
    """How a family is published in a form that transformers does not read.

    Attributes:
        model: Returns transformers' model for a published config.
        tensors: Returns published tensors for those of that model as it saves them.
    """

    model: Callable[[dict[str, Any]], Any]
    tensors: Callable[[dict[str, Any]], dict[str, Any]]


def transformers_model(config: dict[str, Any]) -> Any:
    return getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))


def text(length: int) -> Piece:
    return Piece(RNG.integers(1, TEXT_TOKENS, length).tolist())


def qwen_patches(times: int, rows: int, columns: int) -> np.ndarray:
    return RNG.standard_normal((times * rows * columns, 3 * 2 * 4 * 4)).astype(np.float32)


def qwen_image(rows: int, columns: int) -> Piece:
    data = {"pixel_values": qwen_patches(1, rows, columns), "image_grid_thw": np.array([1, rows, columns])}
    return Piece([IMAGE] * (rows * columns // 4), "image", None, data)


def paddle_image(rows: int, columns: int) -> Piece:
    pixels = RNG.standard_normal((rows * columns, 3, 4, 4)).astype(np.float32)
    data = {"pixel_values": pixels, "image_grid_thw": np.array([1, rows, columns])}
    return Piece([IMAGE] * (rows * columns // 4), "image", None, data)


def qwen2_5_video(times: int, rows: int, columns: int) -> Piece:
    data = {
        "pixel_values_videos": qwen_patches(times, rows, columns),
        "video_grid_thw": np.array([times, rows, columns]),
        "second_per_grid_ts": np.array(0.5),
    }
    return Piece([VIDEO] * (times * rows * columns // 4), "video", None, data)


def qwen3_video(times: int, rows: int, columns: int) -> Piece:
    """Frames between two marks, each after two tokens that say when it is."""
    frame = [7, 8, START] + [VIDEO] * (rows * columns // 4) + [END]
    data = {
        "pixel_values_videos": qwen_patches(times, rows, columns),
        "video_grid_thw": np.array([times, rows, columns]),
    }
    return Piece(frame * times, "video", [token == VIDEO for token in frame] * times, data)


def glm_video(times: int, rows: int, columns: int) -> Piece:
    """Frames between two marks, each with the placeholders of images."""
    frame = [START] + [IMAGE] * (rows * columns // 4) + [END]
    data = {
        "pixel_values_videos": qwen_patches(times, rows, columns),
        "video_grid_thw": np.array([times, rows, columns]),
    }
    return Piece([124, *frame * times, 125], "video", [token == IMAGE for token in [124, *frame * times, 125]], data)


def square_image(crops: int, tokens: int) -> Callable[[int, int], Piece]:
    """Return what makes images of a size that is always the same, or crops of it."""

    def make(rows: int, columns: int) -> Piece:
        del rows, columns
        pixels = RNG.standard_normal((crops, 3, 16, 16)).astype(np.float32)
        return Piece([IMAGE] * tokens, "image", None, {"pixel_values": pixels})

    return make


def add_batch(inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][None]


def add_sizes(inputs: dict[str, Any]) -> None:
    count, _, height, width = inputs["pixel_values"].shape
    inputs["image_sizes"] = torch.tensor([[height, width]] * count)


def mistral_image(rows: int, columns: int) -> Piece:
    """An image whose rows of merged patches end in a mark; transformers takes several of one size only."""
    del rows, columns
    pixels = RNG.standard_normal((3, 16, 24)).astype(np.float32)
    marks = [*[IMAGE] * 3, END] * 2
    return Piece(marks, "image", [token == IMAGE for token in marks], {"pixel_values": pixels})


def lighton_image(rows: int, columns: int) -> Piece:
    """A page without marks; transformers takes several of one size only."""
    del rows, columns
    return Piece([IMAGE] * 6, "image", None, {"pixel_values": RNG.standard_normal((3, 16, 24)).astype(np.float32)})


def pixtral_image(rows: int, columns: int) -> Piece:
    """An image whose rows of patches end in a mark; transformers takes several of one size only."""
    del rows, columns
    pixels = RNG.standard_normal((3, 16, 24)).astype(np.float32)
    marks = [*[IMAGE] * 6, END] * 4
    return Piece(marks, "image", [token == IMAGE for token in marks], {"pixel_values": pixels})


def cropped_image(most: float = math.inf) -> Callable[[int, int], Piece]:
    """Return what makes images cut into crops of 4 × 4 patches, with an end to each line.

    Args:
        most: How many times the patches of a crop all crops may have together before they are made smaller.
    """

    def make(rows: int, columns: int) -> Piece:
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

        size = [5 * rows, 5 * columns]
        down, across = get_anyres_image_grid_shape(size, [[16, 32], [32, 16], [32, 32]], 16)
        _, lines, cells = unpad_image(torch.zeros(1, 4 * down, 4 * across), size).shape
        ratio = (lines * cells / (most * 16)) ** 0.5
        if ratio > 1.1:
            lines, cells = int(lines // ratio), int(cells // ratio)
        pixels = RNG.standard_normal((1 + down * across, 3, 16, 16)).astype(np.float32)
        tokens = [IMAGE] * (16 + lines * (cells + 1))
        return Piece(tokens, "image", None, {"pixel_values": pixels, "image_sizes": np.array(size)})

    return make


def onevision_video(times: int, rows: int, columns: int) -> Piece:
    del rows, columns
    pixels = RNG.standard_normal((times, 3, 16, 16)).astype(np.float32)
    return Piece([VIDEO] * (4 * times + 1), "video", None, {"pixel_values_videos": pixels})


def lfm_image(rows: int, columns: int) -> Piece:
    """A tile whose last patches are padding, and a smaller one."""
    pixels = RNG.standard_normal((2, 40, 3 * 4 * 4)).astype(np.float32)
    data = {"pixel_values": pixels, "spatial_shapes": np.array([[rows, columns], [2, 4]])}
    return Piece([IMAGE] * (rows * columns // 4 + 2), "image", None, data)


def add_mask(inputs: dict[str, Any]) -> None:
    sizes = inputs["spatial_shapes"].prod(1)
    inputs["pixel_attention_mask"] = torch.arange(40)[None] < sizes[:, None]


def gemma_image(rows: int, columns: int) -> Piece:
    """One image of a size that is always the same, with a mark at each end."""
    del rows, columns
    pixels = RNG.standard_normal((1, 3, 16, 16)).astype(np.float32)
    marks = [START, *[IMAGE] * 16, END]
    return Piece(marks, "image", [token == IMAGE for token in marks], {"pixel_values": pixels})


def gemma4_patches(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return patches and where they are, and padding after them."""
    places = np.full((40, 2), -1)
    places[: rows * columns] = [(x, y) for y in range(rows) for x in range(columns)]
    pixels = RNG.random((40, 3 * 4 * 4)).astype(np.float32)
    return pixels * (places[:, :1] >= 0).astype(np.float32), places


def gemma4_image(rows: int, columns: int) -> Piece:
    pixels, places = gemma4_patches(rows, columns)
    marks = [START, *[IMAGE] * (rows * columns // 4), END]
    data = {"pixel_values": pixels, "pixel_position_ids": places}
    return Piece(marks, "image", [token == IMAGE for token in marks], data)


def gemma4_video(times: int, rows: int, columns: int) -> Piece:
    frames = [gemma4_patches(rows, columns) for _ in range(times)]
    frame = [7, START, *[VIDEO] * (rows * columns // 4), END]
    data = {
        "pixel_values_videos": np.stack([pixels for pixels, _ in frames]),
        "pixel_position_ids_videos": np.stack([places for _, places in frames]),
        "video_frame_counts": np.array(times),
    }
    return Piece(frame * times, "video", [token == VIDEO for token in frame] * times, data)


def gemma4_audio() -> Piece:
    """Sound whose last features are padding."""
    features, valid = RNG.standard_normal((26, 128)).astype(np.float32), np.arange(26) < 21
    marks = [START, *[AUDIO] * 6, END]
    data = {"input_features_padded": features * valid[:, None].astype(np.float32), "input_features_mask": valid}
    return Piece(marks, "audio", [token == AUDIO for token in marks], data)


def unified_image(rows: int, columns: int) -> Piece:
    pixels, places = gemma4_patches(rows, columns)
    marks = [START, *[IMAGE] * (rows * columns), END]
    data = {"pixel_values": pixels, "pixel_position_ids": places}
    return Piece(marks, "image", [token == IMAGE for token in marks], data)


def unified_audio() -> Piece:
    marks = [START, *[AUDIO] * 5, END]
    data = {
        "input_features_padded": RNG.standard_normal((5, 16)).astype(np.float32),
        "input_features_mask": np.ones(5, bool),
    }
    return Piece(marks, "audio", [token == AUDIO for token in marks], data)


def flat_image(crops: int, tokens: int) -> Callable[[int, int], Piece]:
    """Return what makes crops between two marks, under the name that InternVL's own processor has for them."""
    square = square_image(crops, tokens)

    def make(rows: int, columns: int) -> Piece:
        piece = square(rows, columns)
        tokens = [START, *piece.tokens, END]
        return Piece(
            tokens, "image", [token == IMAGE for token in tokens], {"pixel_values_flat": piece.data["pixel_values"]}
        )

    return make


def internvl_model(config: dict[str, Any]) -> Any:
    vision = config["vision_config"]
    sizes = {name: [vision[name]] * 2 for name in ("image_size", "patch_size")}
    made = {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "image_token_id": IMAGE,
        "text_config": config["llm_config"], "downsample_ratio": config["downsample_ratio"],
        "tie_word_embeddings": config["llm_config"]["tie_word_embeddings"],
        "vision_config": vision | sizes | {"model_type": "internvl_vision", "attention_bias": vision["qkv_bias"]},
    }  # fmt: skip
    return transformers_model(made)


def internvl_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    names = {
        "vision_tower.": "vision_model.", "encoder.layer.": "encoder.layers.", "cls_token": "class_embedding",
        "patch_embeddings.projection": "patch_embedding", "position_embeddings": "position_embedding",
        "attention.projection_layer": "attn.proj", "lambda_": "ls", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "multi_modal_projector.layer_norm": "mlp1.0",
        "multi_modal_projector.linear_1": "mlp1.1", "multi_modal_projector.linear_2": "mlp1.3",
    }  # fmt: skip
    found = joined(tensors, [f"attention.{part}_proj" for part in "qkv"], "attn.qkv")
    return {renamed(name, names): tensor for name, tensor in found.items()}


def kimi_image(rows: int, columns: int) -> Piece:
    pixels = RNG.standard_normal((rows * columns, 3, 4, 4)).astype(np.float32)
    data = {"pixel_values": pixels, "image_grid_hws": np.array([rows, columns])}
    return Piece([IMAGE] * (rows * columns // 4), "image", None, data)


def add_frames(inputs: dict[str, Any]) -> None:
    sizes = inputs.pop("image_grid_hws")
    inputs["image_grid_thw"] = torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1)


def kimi_model(config: dict[str, Any]) -> Any:
    """Kimi K2.5's tower is Kimi-VL's, with frames."""
    vision = config["vision_config"]
    side = {"pos_emb_height": vision["init_pos_emb_height"], "pos_emb_width": vision["init_pos_emb_width"]}
    sizes = {name: size for name, size in vision.items() if name not in ("model_type", "init_pos_emb_height")}
    made = {
        "architectures": ["Kimi_K25ForConditionalGeneration"], "model_type": "kimi_k25", "image_token_id": IMAGE,
        "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
        "text_config": config["text_config"], "tie_word_embeddings": False,
        "projection_hidden_size": vision["hidden_size"], "vision_config": sizes | side,
    }  # fmt: skip
    return transformers_model(made)


def kimi_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    names = {
        "model.mm_projector": "mm_projector", "mm_projector": "multi_modal_projector", ".proj.0.": ".linear_1.",
        ".proj.2.": ".linear_2.",
        "language_model.model.blocks": "language_model.model.layers",
    }  # fmt: skip
    return {renamed(name, names): tensor for name, tensor in tensors.items()}


def ocr_image(rows: int, columns: int) -> Piece:
    """A whole page, and two crops of it where it is large."""
    across, down = (2, 1) if rows > 4 else (1, 1)
    data = {
        "pixel_values": RNG.standard_normal((3, 256, 256)).astype(np.float32),
        "images_crop": RNG.standard_normal((across * down if rows > 4 else 0, 3, 128, 128)).astype(np.float32),
        "images_spatial_crop": np.array([across, down]),
    }
    return Piece([IMAGE] * (4 * 5 + 1 + (2 * 5 if rows > 4 else 0)), "image", None, data)


def name_crops(inputs: dict[str, Any]) -> None:
    inputs["pixel_values_local"], inputs["num_local_patches"] = (
        inputs.pop(name) for name in ("images_crop", "images_spatial_crop")
    )


def ocr_model(config: dict[str, Any]) -> Any:
    """DeepSeek-OCR 2 with CLIP behind SAM, and ends of lines, in place of what it has behind SAM."""
    from transformers.models.clip.modeling_clip import CLIPEncoder

    vision, text = config["vision_config"], config["language_config"]
    sam, clip = vision["width"]["sam_vit_b"], vision["width"]["clip-l-14-224"]
    layers = [*["dense"] * text["first_k_dense_replace"], *["sparse"] * text["num_hidden_layers"]]
    made = transformers.DeepseekOcr2Config(
        text_config=text | {"mlp_layer_types": layers[: text["num_hidden_layers"]]}, image_token_id=IMAGE,
        vision_config={
            "sam_config": sam | {
                "hidden_size": sam["width"], "num_hidden_layers": sam["layers"], "num_attention_heads": sam["heads"],
                "image_size": vision["image_size"],
            },
            "encoder_config": {"hidden_size": clip["width"], "num_hidden_layers": 0, "num_attention_heads": 2},
        },
    )  # fmt: skip

    class Reference(transformers.DeepseekOcr2ForConditionalGeneration):
        def __init__(self) -> None:
            super().__init__(made)
            width, side = clip["width"], clip["image_size"] // clip["patch_size"]
            sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": clip["heads"]}
            sizes |= {"num_hidden_layers": clip["layers"], "attn_implementation": "eager"}
            settings = transformers.CLIPVisionConfig(**sizes)
            self.clip = torch.nn.Module()
            self.clip.transformer = CLIPEncoder(settings)
            self.clip.pre_layrnorm = torch.nn.LayerNorm(width)
            self.clip.embeddings = torch.nn.Module()
            self.clip.embeddings.class_embedding = torch.nn.Parameter(torch.zeros(width))
            self.clip.embeddings.position_embedding = torch.nn.Embedding(side**2 + 1, width)
            patches = torch.nn.Conv2d(3, width, clip["patch_size"], clip["patch_size"], bias=False)
            self.clip.embeddings.patch_embedding = patches
            self.both = torch.nn.Linear(2 * width, text["hidden_size"])
            self.image_newline = torch.nn.Parameter(torch.zeros(text["hidden_size"]))
            self.model.get_image_features = self.features

        def seen(self, pixels: Any) -> Any:
            first = self.model.vision_tower.sam_encoder(pixels).last_hidden_state
            count, width, rows, _ = first.shape
            table = self.clip.embeddings.position_embedding.weight
            side = int((len(table) - 1) ** 0.5)
            places = torch.nn.functional.interpolate(
                table[1:].T.reshape(1, width, side, side), (rows, rows), mode="bicubic", antialias=True
            ).flatten(2)
            start = (self.clip.embeddings.class_embedding + table[0]).expand(count, 1, width)
            patches = torch.cat([start, (first.flatten(2) + places).mT], dim=1)
            second = self.clip.transformer(self.clip.pre_layrnorm(patches)).last_hidden_state[:, 1:]
            return self.both(torch.cat([second, first.flatten(2).mT], dim=-1)).unflatten(1, (rows, rows))

        def lines(self, grid: Any) -> Any:
            ends = self.image_newline.expand(len(grid), 1, -1)
            return torch.cat([grid, ends], dim=1).flatten(0, 1)

        def features(self, pixels: Any, crops: Any, tiles: Any, **kwargs: Any) -> Any:
            found, at = [], 0
            for whole, (across, down) in zip(pixels, tiles.tolist(), strict=True):
                parts = [self.lines(self.seen(whole[None])[0]), self.model.view_separator[None]]
                if across * down > 1:
                    own = self.seen(crops[at : at + across * down])
                    at += across * down
                    rows = [torch.cat(list(own[row * across : (row + 1) * across]), dim=1) for row in range(down)]
                    parts.insert(0, self.lines(torch.cat(rows)))
                found.append(torch.cat(parts))
            return SimpleNamespace(pooler_output=found)

    return Reference()


def ocr_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    own = {name: array for name, array in tensors.items() if not name.startswith(("model.projector", "model.qwen2"))}
    found = joined(own, [f"self_attn.{part}_proj" for part in "qkv"], "self_attn.qkv_proj", within="clip.")
    names = {"both.": "model.projector.layers.", "clip.": "model.vision_model.", "image_n": "model.image_n"}
    return {renamed(name, names): tensor for name, tensor in found.items()}


def ocr2_image(rows: int, columns: int) -> Piece:
    """A whole page, and two crops of it where it is large; of these sizes there are queries."""
    crops = 2 if rows > 4 else 0
    data = {
        "pixel_values": RNG.standard_normal((3, 1024, 1024)).astype(np.float32),
        "images_crop": RNG.standard_normal((crops, 3, 768, 768)).astype(np.float32),
        "images_spatial_crop": np.array([max(crops, 1), 1]),
    }
    return Piece([IMAGE] * (256 + 144 * crops + 1), "image", None, data)


def count_crops(inputs: dict[str, Any]) -> None:
    name_crops(inputs)
    sizes = inputs["num_local_patches"].prod(1)
    inputs["num_local_patches"] = torch.where(sizes > 1, sizes, 0)
    if not len(inputs["pixel_values_local"]):
        inputs["pixel_values_local"] = None


def ocr2_model(config: dict[str, Any]) -> Any:
    vision, text = config["vision_config"], config["language_config"]
    sam, queries = vision["width"]["sam_vit_b"], vision["width"]["qwen2-0-5b"]
    layers = [*["dense"] * text["first_k_dense_replace"], *["sparse"] * text["num_hidden_layers"]]
    made = {
        "architectures": ["DeepseekOcr2ForConditionalGeneration"], "model_type": "deepseek_ocr2",
        "text_config": text | {"mlp_layer_types": layers[: text["num_hidden_layers"]]}, "image_token_id": IMAGE,
        "vision_config": {
            "sam_config": sam | {
                "hidden_size": sam["width"], "num_hidden_layers": sam["layers"], "num_attention_heads": sam["heads"],
                "image_size": vision["image_size"],
            },
            "encoder_config": {
                "hidden_size": queries["dim"], "num_hidden_layers": queries["layers"],
                "num_attention_heads": queries["heads"], "num_key_value_heads": queries["kv_heads"],
                "intermediate_size": queries["intermediate_size"],
                "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            },
        },
    }  # fmt: skip
    return transformers_model(made)


def minicpm_slices(sizes: Sequence[tuple[int, int]], token: int, prefix: str) -> tuple[list[int], dict[str, Any]]:
    """Return tokens and data of slices; the strips of shorter ones are padded."""
    longest = max(rows * columns for rows, columns in sizes)
    strips = RNG.standard_normal((len(sizes), 3, 4, 4 * longest)).astype(np.float32)
    tokens = []
    for strip, (rows, columns) in zip(strips, sizes, strict=True):
        strip[:, :, 4 * rows * columns :] = 0
        tokens += [START, *[token] * (rows * columns // 16), END]
    flags = {f"{prefix}use_vit_merger": np.array([True])}
    return tokens, {f"{prefix}pixel_values": strips, f"{prefix}tgt_sizes": np.array(sizes)} | flags


def minicpm_image(rows: int, columns: int) -> Piece:
    tokens, data = minicpm_slices([(4, 8), (2 * rows, 12)], IMAGE, "")
    return Piece(tokens, "image", [token == IMAGE for token in tokens], data)


def minicpm_video(times: int, rows: int, columns: int) -> Piece:
    tokens, data = minicpm_slices([(rows, 2 * columns)] * times, VIDEO, "video_")
    return Piece(tokens, "video", [token == VIDEO for token in tokens], data)


def join_strips(inputs: dict[str, Any]) -> None:
    """Put strips side by side without their padding, as transformers takes them."""
    for prefix, suffix in (("", ""), ("video_", "_videos")):
        if f"{prefix}tgt_sizes" not in inputs:
            continue
        strips, sizes = inputs.pop(f"{prefix}pixel_values"), inputs.pop(f"{prefix}tgt_sizes")
        inputs.pop(f"{prefix}use_vit_merger")
        own = [strip[..., : 4 * int(size.prod())] for strip, size in zip(strips, sizes, strict=True)]
        inputs[f"pixel_values{suffix}"] = torch.cat(own, dim=-1)[None]
        inputs[f"target_sizes{suffix}"] = sizes


def dots_image(rows: int, columns: int) -> Piece:
    pixels = RNG.standard_normal((rows * columns, 3 * 4 * 4)).astype(np.float32)
    data = {"pixel_values": pixels, "image_grid_thw": np.array([1, rows, columns])}
    return Piece([IMAGE] * (rows * columns // 4), "image", None, data)


def dots_model(config: dict[str, Any]) -> Any:
    """Qwen 2 after a tower that is written here from its description: no library has it."""
    from torch.nn import functional

    vision = config["vision_config"]
    width, heads, side = vision["embed_dim"], vision["num_attention_heads"], vision["patch_size"]
    inner, eps, merged = vision["intermediate_size"], vision["rms_norm_eps"], 4 * vision["embed_dim"]

    def module(**parts: Any) -> Any:
        made = torch.nn.Module()
        for name, part in parts.items():
            setattr(made, name, part)
        return made

    def linear(inputs: int, outputs: int) -> Any:
        return torch.nn.Linear(inputs, outputs, bias=False)

    def norm() -> Any:
        return torch.nn.RMSNorm(width, eps=eps)

    class Reference(transformers.Qwen2ForCausalLM):
        def __init__(self) -> None:
            super().__init__(transformers.Qwen2Config(**{**config, "model_type": "qwen2"}))
            blocks = [
                module(
                    norm1=norm(), norm2=norm(), attn=module(qkv=linear(width, 3 * width), proj=linear(width, width)),
                    mlp=module(fc1=linear(width, inner), fc2=linear(inner, width), fc3=linear(width, inner)),
                )
                for _ in range(vision["num_hidden_layers"])
            ]  # fmt: skip
            layers = [torch.nn.Linear(merged, merged), torch.nn.GELU(), torch.nn.Linear(merged, vision["hidden_size"])]
            self.vision_tower = module(
                patch_embed=module(patchifier=module(proj=torch.nn.Conv2d(3, width, side, side), norm=norm())),
                blocks=torch.nn.ModuleList(blocks),
                post_trunk_norm=norm(),
                merger=module(ln_q=torch.nn.LayerNorm(width, eps=1e-6), mlp=torch.nn.Sequential(*layers)),
            )

        def seen(self, pixels: Any, rows: int, columns: int) -> Any:
            tower = self.vision_tower
            first = tower.patch_embed.patchifier
            x = first.norm(first.proj(pixels.view(-1, 3, side, side)).flatten(1))
            down, across = (
                place.reshape(rows // 2, 2, columns // 2, 2).transpose(1, 2).flatten()
                for place in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            )
            steps = 10000 ** (-torch.arange(0, width // heads // 2, 2) / (width // heads // 2))
            angles = torch.cat([down[:, None] * steps, across[:, None] * steps], dim=1)[:, None]

            def turned(part: Any) -> Any:
                one, two = part.chunk(2, dim=-1)
                cos, sin = angles.cos(), angles.sin()
                return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)

            for block in tower.blocks:
                query, key, value = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, -1).unbind(1)
                query, key, value = (part.transpose(0, 1) for part in (turned(query), turned(key), value))
                out = functional.scaled_dot_product_attention(query, key, value)
                x = x + block.attn.proj(out.transpose(0, 1).flatten(1))
                y = block.norm2(x)
                x = x + block.mlp.fc2(functional.silu(block.mlp.fc1(y)) * block.mlp.fc3(y))
            return tower.merger.mlp(tower.merger.ln_q(tower.post_trunk_norm(x)).view(-1, merged))

        def forward(self, input_ids: Any, pixel_values: Any = None, image_grid_thw: Any = (), **_: Any) -> Any:
            rows, at = self.model.embed_tokens(input_ids), 0
            found = []
            for _, height, columns in image_grid_thw.tolist() if len(image_grid_thw) else ():
                found.append(self.seen(pixel_values[at : at + height * columns], height, columns))
                at += height * columns
            if found:
                rows = rows.masked_scatter((input_ids == IMAGE)[..., None], torch.cat(found))
            return super().forward(inputs_embeds=rows)

    return Reference()


def between(mark: int, piece: Piece, end: int) -> Piece:
    """Return a piece between two marks that say what it is."""
    return Piece([mark, *piece.tokens, end], piece.modality, [False, *[True] * len(piece.tokens), False], piece.data)


def omni_image(rows: int, columns: int) -> Piece:
    return between(START, qwen_image(rows, columns), END)


def omni_video(times: int, rows: int, columns: int) -> Piece:
    video = qwen2_5_video(times, rows, columns)
    video.data["second_per_grid_ts"] = np.array(1.0)
    return between(START, video, END)


def omni_audio() -> Piece:
    """Sound of more than one window."""
    data = {
        "input_audio_features": RNG.standard_normal((16, 130)).astype(np.float32),
        "audio_feature_lengths": np.array(130), "feature_attention_mask": np.ones(130, np.int64),
    }  # fmt: skip
    return between(124, Piece([AUDIO] * 17, "audio", None, data), 125)


def omni_model(config: dict[str, Any]) -> Any:
    """The thinker alone."""
    made = transformers.Qwen3OmniMoeThinkerConfig(**config["thinker_config"])
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(made)


def omni_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"thinker.{name.removeprefix('thinker.')}": tensor for name, tensor in tensors.items()}


def joined(tensors: dict[str, Any], parts: Sequence[str], whole: str, within: str = "") -> dict[str, Any]:
    """Return tensors in which some that lie side by side are one."""
    found = dict(tensors)
    for name in [name for name in tensors if parts[0] in name and within in name]:
        own = [found.pop(name.replace(parts[0], part)) for part in parts]
        found[name.replace(parts[0], whole)] = torch.cat(own)
    return found


def renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


CASES = {
    "cohere2_vision": Case(square_image(2, 8)),
    "deepseek_ocr": Case(
        ocr_image, joined={"images_crop"}, adjust=name_crops, published=Published(ocr_model, ocr_tensors)
    ),
    "dots_ocr": Case(dots_image, published=Published(dots_model, lambda saved: saved)),
    "glm4v": Case(qwen_image, glm_video),
    "glm4v_moe": Case(qwen_image),
    "glm_ocr": Case(qwen_image, glm_video),
    "gemma4_unified": Case(
        unified_image, audio=unified_audio,
        renamed={"pixel_position_ids": "image_position_ids", "input_features_padded": "input_features"},
        joined=set(),
    ),
    "llama4": Case(square_image(3, 12)),
    "granite_vision": Case(cropped_image(), joined=set(), padded={"pixel_values"}),
    "internvl": Case(square_image(2, 8)),
    "internvl_chat": Case(
        flat_image(2, 8), joined={"pixel_values_flat"}, renamed={"pixel_values_flat": "pixel_values"},
        published=Published(internvl_model, internvl_tensors),
    ),
    "kimi_vl": Case(
        kimi_image, joined={"pixel_values"}, adjust=add_frames, published=Published(kimi_model, kimi_tensors)
    ),
    "lfm2_vl": Case(lfm_image, joined={"pixel_values", "spatial_shapes"}, adjust=add_mask),
    "lighton_ocr": Case(lighton_image, joined=set(), adjust=add_sizes),
    "llava": Case(square_image(1, 16)),
    "llava_next": Case(cropped_image(), joined=set(), padded={"pixel_values"}),
    "llava_onevision": Case(cropped_image(1), onevision_video, joined=set(), padded={"pixel_values"}),
    "llava_siglip": Case(square_image(1, 16)),
    "minicpmv4_6": Case(
        minicpm_image, minicpm_video, joined={"tgt_sizes", "video_pixel_values", "video_tgt_sizes"},
        listed={"pixel_values"}, adjust=join_strips,
    ),
    "mistral3": Case(mistral_image, joined=set(), adjust=add_sizes),
    "paddleocr_vl": Case(paddle_image),
    "pixtral": Case(pixtral_image, joined=set(), adjust=add_sizes),
    "qwen2_vl": Case(qwen_image),
    "qwen2_5_vl": Case(qwen_image, qwen2_5_video),
    "qwen3_vl": Case(qwen_image, qwen3_video),
    "qwen3_5": Case(qwen_image, qwen3_video),
    "qwen3_omni_moe": Case(
        omni_image, omni_video, omni_audio,
        renamed={"input_audio_features": "input_features", "second_per_grid_ts": "video_second_per_grid"},
        published=Published(omni_model, omni_tensors),
    ),
    "smolvlm": Case(square_image(3, 12), adjust=add_batch),
    "gemma3": Case(gemma_image),
    "gemma4": Case(
        gemma4_image, gemma4_video, gemma4_audio,
        joined={"pixel_values_videos", "pixel_position_ids_videos"},
        renamed={
            "pixel_position_ids": "image_position_ids", "pixel_position_ids_videos": "video_position_ids",
            "video_frame_counts": "num_frames_per_video", "input_features_padded": "input_features",
        },
    ),
}  # fmt: skip

# Of images of one size only, whose many rows take their time.
LARGE = {
    "deepseek_ocr2": Case(
        ocr2_image, joined={"images_crop"}, adjust=count_crops, published=Published(ocr2_model, lambda saved: saved)
    ),
}  # fmt: skip


@dataclass
class Prompt:
    tokens: list[int]
    items: list[MultimodalItem]


def prompt(*pieces: Piece) -> Prompt:
    tokens: list[int] = []
    items = []
    for piece in pieces:
        if piece.data is not None:
            is_embed = None if piece.is_embed is None else np.array(piece.is_embed)
            items.append(MultimodalItem(piece.modality, len(tokens), len(piece.tokens), is_embed, piece.data))
        tokens += piece.tokens
    return Prompt(tokens, items)


@dataclass
class Family:
    """A tiny checkpoint as transformers writes it, its model there, and its two halves here."""

    case: Case
    reference: Any
    model: Any
    towers: Any
    path: Path


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    known: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in known:
            known.clear()  # one at a time in memory
            known[name] = _make(name, tmp_path_factory.mktemp(name))
        return known[name]

    return make


def _make(name: str, path: Path) -> Family:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    case = (CASES | LARGE)[name]
    reference = (case.published.model if case.published else transformers_model)(config).eval()
    if name == "paddleocr_vl":
        # transformers 5 stretches positions from corner to corner; vLLM, and transformers before, from edge to edge.
        reference.model.visual.vision_model.embeddings.interpolation_align_corners = False
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn_like(parameter)
            inputs = parameter[0].numel() if len(parameter) > 1 else parameter.shape[-1]
            scaled = 0.2 * noise if parameter.ndim < 2 else noise * (1.5 / inputs**0.5)
            parameter.copy_(parameter + scaled if parameter.ndim < 2 else scaled)
        reference.get_output_embeddings().weight[TEXT_TOKENS:] = 0  # so that no mark is generated
    reference.save_pretrained(path)
    if case.published:
        (path / "config.json").write_text(json.dumps(config))
        tensors = case.published.tensors(safetensors.load_file(path / "model.safetensors"))
        own = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.save_file(own, path / "model.safetensors")
    config = read_config(path)
    assert has_towers(config)
    return Family(case, reference, load(path), load_towers(path, config), path)


def expected(family: Family, prompt: Prompt) -> tuple[list[int], np.ndarray]:
    """Generate greedily with transformers, with a forward pass over everything for each token."""
    tokens, rows = list(prompt.tokens), []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            inputs = reference_inputs(family.case, tokens, prompt.items)
            if family.case.video is qwen2_5_video:
                # transformers 5 lets the text after a video start within it; vLLM does not.
                found, delta = family.towers.rope_positions(np.array(prompt.tokens, np.int32), prompt.items)
                later = np.arange(len(prompt.tokens), len(tokens), dtype=np.int32) + delta
                where = np.concatenate([found, np.broadcast_to(later, (3, len(later)))], axis=1)
                inputs["position_ids"] = torch.from_numpy(where[:, None].astype(np.int64))
            if family.case.image is unified_image:
                # transformers' forward masks layers without a window, too; its generate does not, as vLLM.
                inputs["attention_mask"] = family.reference.create_masks_for_generate(
                    family.reference.config,
                    torch.zeros(1, len(tokens), 1),
                    None,
                    None,
                    None,
                    inputs["mm_token_type_ids"],
                )
            encode_frames(family.reference, inputs)
            logits = family.reference(**inputs).logits[0, -1]
        rows.append(torch.log_softmax(logits.float(), -1).numpy())
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt.tokens) :], np.stack(rows)


def encode_frames(reference: Any, inputs: dict[str, Any]) -> None:
    """Replace frames by what the encoder makes of them, where transformers 5.19 forgets to count them itself."""
    if "num_frames_per_video" not in inputs:
        return
    names = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")
    encoded = {"video": reference.model.get_video_features(**{name: inputs.pop(name) for name in names})}
    if "pixel_values" in inputs:
        names = ("pixel_values", "image_position_ids")
        encoded["image"] = reference.model.get_image_features(**{name: inputs.pop(name) for name in names})
    inputs["mm_encoder_outputs"] = encoded


def reference_inputs(case: Case, tokens: Sequence[int], items: Sequence[MultimodalItem]) -> dict[str, Any]:
    kinds = {"image": 1, "video": 2, "audio": 3}
    inputs = {"input_ids": torch.tensor([tokens])}
    inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    for item in items:
        inputs["mm_token_type_ids"][0, item.embed_positions] = kinds[item.modality]
    inputs["token_type_ids"] = inputs["mm_token_type_ids"]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in dict.fromkeys(name for item in items for name in item.data):
        arrays = [item.data[name] for item in items if name in item.data]
        if name in case.padded:
            longest = max(len(array) for array in arrays)
            arrays = [np.concatenate([array, np.zeros_like(array)])[:longest] for array in arrays]
        if name in case.listed:
            inputs[name] = [torch.from_numpy(part) for array in arrays for part in array]
            continue
        joined = np.concatenate(arrays) if name in case.joined else np.stack(arrays)
        inputs[case.renamed.get(name, name)] = torch.from_numpy(joined)
    if items:
        case.adjust(inputs)
    return inputs


def serving(lab: SimpleNamespace, family: Family) -> Any:
    return lab.ItemServer(family.model, family.towers)


def check(family: Family, requests: Sequence[Any], prompts: Sequence[Prompt]) -> None:
    for request, prompt in zip(requests, prompts, strict=True):
        tokens, logprobs = expected(family, prompt)
        assert request.tokens[len(prompt.tokens) :] == tokens
        np.testing.assert_allclose(np.stack(request.logprobs), logprobs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_inputs_at_any_place_beside_text(name: str, family_of: Callable[[str], Family], lab: SimpleNamespace) -> None:
    family = family_of(name)
    image = family.case.image
    prompts = [
        prompt(image(4, 6), text(5)),
        prompt(text(9)),
        prompt(text(3), image(4, 4), text(2), image(8, 4), text(1)),
        prompt(text(2), image(4, 4), text(1), image(4, 4)),
    ]
    if family.case.video is not None:
        beside = text(4) if family.case.video is glm_video else image(4, 4)  # transformers takes no image beside one
        prompts.append(prompt(text(2), family.case.video(3, 4, 4), text(2), beside, text(3)))
    if family.case.audio is not None:
        prompts.append(prompt(text(3), family.case.audio(), text(4), image(4, 4), family.case.audio(), text(2)))
    server = serving(lab, family)
    requests = [server.ask(prompt.tokens, prompt.items) for prompt in prompts]
    lab.serve_mixed(server, requests, NEW_TOKENS, chunk=5)
    check(family, requests, prompts)


@pytest.mark.parametrize("name", CASES)
def test_a_prefix_that_ends_within_an_image_is_shared(
    name: str, family_of: Callable[[str], Family], lab: SimpleNamespace
) -> None:
    family = family_of(name)
    server = serving(lab, family)
    block_size = max(group.block_size for group in server.groups)
    shared = -(-6 // block_size) * block_size
    first = prompt(text(shared - 5), family.case.image(8, 4), text(4))
    second = Prompt(first.tokens[:-2] + text(5).tokens, first.items)
    requests = [server.ask(first.tokens, first.items)]
    server.step([(requests[0], shared)])
    server.step([(requests[0], len(first.tokens) - requests[0].computed)])
    requests.append(server.ask(second.tokens, second.items, shares=requests[0], shared_tokens=shared))
    lab.serve_mixed(server, requests, NEW_TOKENS, chunk=64)
    check(family, requests, [first, second])


def test_video_with_its_own_sound(family_of: Callable[[str], Family]) -> None:
    family = family_of("qwen3_omni_moe")
    video = omni_video(2, 4, 4)
    video.data["use_audio_in_video"] = np.array([True])
    asked = prompt(text(3), video)
    with pytest.raises(MetalModelsError, match=r"got use_audio_in_video\. Give the sound beside it"):
        family.towers.rope_positions(np.array(asked.tokens, np.int32), asked.items)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_images(name: str, family_of: Callable[[str], Family], lab: SimpleNamespace) -> None:
    family = family_of(name)
    asked = prompt(text(3), family.case.image(8, 4), text(2))
    server = serving(lab, family)
    requests = [server.ask(asked.tokens, asked.items)]
    lab.serve_mixed(server, requests, NEW_TOKENS, chunk=200)
    check(family, requests, [asked])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_mlx_vlms_own_model_generates_the_same(
    name: str, family_of: Callable[[str], Family], lab: SimpleNamespace
) -> None:
    family = family_of(name)
    config = read_config(family.path)
    config["vision_config"]["model_type"] = name
    config["text_config"]["rope_scaling"] = {"type": "default", **config["text_config"]["rope_parameters"]}
    whole = build_vlm(name, config)
    weights: Any = mx.load(str(family.path / "model.safetensors"))
    whole.module.load_weights(list(whole.sanitize(weights, ("", "vision_tower")).items()))
    asked = prompt(text(3), Piece([START]), family.case.image(4, 6), Piece([END]), text(4))
    server = serving(lab, family)
    request = server.ask(asked.tokens, asked.items)
    lab.serve_mixed(server, [request], NEW_TOKENS, chunk=4)
    pixels, grid = (mx.array(asked.items[0].data[key]) for key in ("pixel_values", "image_grid_thw"))
    for step, logprobs in enumerate(request.logprobs):
        ids = mx.array([request.tokens[: len(asked.tokens) + step]])
        logits = whole.module(ids, pixels, image_grid_thw=grid[None]).logits[0, -1]
        np.testing.assert_allclose(np.array(logits - mx.logsumexp(logits)), logprobs, rtol=1e-3, atol=1e-3)
