"""A GGUF file's metadata in the form of Hugging Face's config.json."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_models.errors import CheckpointError, UnsupportedModelError
from metal_models.gguf.architectures import Architecture, architecture_of
from metal_models.gguf.file import GGUFFile

_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_DTYPES = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float32"}
# Tokens that end a turn. A chat template that writes one means that the model does, whatever the eos.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endofturn|>")


def find_gguf(path: str | Path) -> Path:
    """Return the .gguf file at ``path``: the file itself, or the only one of a directory.

    Vision projectors (``mmproj*.gguf``) are not counted.

    Raises:
        CheckpointError: There is none, or more than one.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(entry for entry in path.glob("*.gguf") if not entry.name.startswith("mmproj"))
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise CheckpointError(f"[gguf] expected one .gguf file in {path}, got {names}. Give the file's path.")
    return found[0]


def open_gguf(path: str | Path) -> GGUFFile:
    """Open the .gguf file at ``path`` (a file, or a directory with one).

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is a part of a model.
    """
    file = GGUFFile.open(find_gguf(path))
    if (parts := int(file.metadata.get("split.count", 1))) > 1:
        raise CheckpointError(
            f"[gguf] expected a whole model, got one of {parts} parts: {file.path}. "
            "Join them with llama.cpp's `llama-gguf-split --merge`."
        )
    return file


def gguf_config(path: str | Path) -> dict[str, Any]:
    """Return config.json's content for the .gguf file at ``path``; reads its header only.

    Raises:
        CheckpointError: The file is damaged, or a value is missing.
        UnsupportedModelError: The architecture, or a feature it uses, is not known.
    """
    return config_of(open_gguf(path))


def config_of(file: GGUFFile) -> dict[str, Any]:
    """Return config.json's content for an opened file; see ``gguf_config``."""
    architecture = architecture_of(file)
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        **architecture.constants,
        **{key: _uniform(file, name) for key, name in _KEYS.items()},
        **{key: file.get(name) for key, name in architecture.keys.items() if file.get(name) is not None},
    }
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = _uniform(file, "attention.head_count_kv", heads)
    config["head_dim"] = int(file.get("attention.key_length", config["hidden_size"] // heads))
    if "norm_epsilon" not in config:
        config["rms_norm_eps"] = _decimal(_uniform(file, "attention.layer_norm_rms_epsilon"))
    else:
        config["norm_epsilon"] = _decimal(config["norm_epsilon"])
    config["vocab_size"] = _embedding_rows(file)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    config["rope_theta"] = float(file.get("rope.freq_base", 10000.0))
    if (scaling := _rope_scaling(file, config)) is not None:
        config["rope_scaling"] = scaling
    config |= _particulars(file, config)
    config |= token_ids(file)
    config["torch_dtype"] = _DTYPES[default_dtype(file, architecture)]
    return config


def default_dtype(file: GGUFFile, architecture: Architecture) -> mx.Dtype:
    """Return the number format that fits the file's matrices: their own, or float16 where quantised.

    Models whose activations overflow float16 get bfloat16 in its place.
    """
    sizes: Counter[str] = Counter()
    for entry in file.tensors.values():
        if len(entry.shape) > 1:
            sizes[entry.type.name] += math.prod(entry.shape)
    kind = sizes.most_common(1)[0][0] if sizes else "F16"
    dtype = {"F32": mx.float32, "BF16": mx.bfloat16}.get(kind, mx.float16)
    return mx.bfloat16 if architecture.wide_range and dtype == mx.float16 else dtype


def token_ids(file: GGUFFile) -> dict[str, Any]:
    """Return bos, eos (a list if several tokens end a reply) and pad as config.json has them."""
    metadata = file.metadata
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    template = metadata.get("tokenizer.chat_template", "")
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends += [tokens.index(end) for end in _TURN_ENDS if end in template and end in tokens]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    ids = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _decimal(value: float) -> float:
    """Undo the file's rounding to float32: 9.99999974e-06 was 1e-05."""
    return float(str(np.float32(value)))


def _uniform(file: GGUFFile, key: str, default: Any = None) -> Any:
    """Return a value that config.json has once; a file may list it per layer."""
    value = file.get(key, default)
    if value is None:
        raise CheckpointError(
            f"[gguf] expected {file.architecture}.{key} in the metadata of {file.path}, got none. "
            "Convert the model again with a current llama.cpp."
        )
    if not isinstance(value, np.ndarray):
        return value
    if len(set(value.tolist())) != 1:
        raise UnsupportedModelError(
            file.architecture,
            f"{key} differs from layer to layer in {file.path}: {sorted(set(value.tolist()))}",
        )
    return value[0].item()


def _embedding_rows(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"[gguf] expected a tensor 'token_embd.weight', got none in {file.path}.")
    return file.tensors["token_embd.weight"].shape[0]


def _rope_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, config)
    if "rope_factors_long.weight" in file.tensors:
        long, short = (_floats(file, f"rope_factors_{kind}.weight").tolist() for kind in ("long", "short"))
        return {"rope_type": "longrope", "type": "longrope", "long_factor": long, "short_factor": short}
    kind = file.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "type": kind, "factor": float(file.get("rope.scaling.factor", 1.0))}
    if kind == "yarn":
        original = file.get("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = int(original or config["max_position_embeddings"])
    elif kind != "linear":
        raise UnsupportedModelError(
            file.architecture, f"its RoPE scaling in {file.path} is {kind!r}, neither linear nor yarn"
        )
    return scaling


def _llama3_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Find the parameters whose factors the file lists: it holds only the factors.

    The formula: Llama 3.1's ``rope_type: llama3``.
    """
    given = _floats(file, "rope_freqs.weight")
    factor = float(given.max())
    original = int(file.get("rope.scaling.original_context_length", 8192))
    width = 2 * len(given)
    waves = 2 * math.pi * config["rope_theta"] ** (np.arange(0, width, 2) / width)
    smooth = np.clip((original / waves - 1.0) / 3.0, 0.0, 1.0)
    if not np.allclose(given, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModelError(
            file.architecture, f"the RoPE factors in {file.path} are not those of Llama 3.1's formula"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _floats(file: GGUFFile, name: str) -> np.ndarray:
    if file.tensors[name].type.name != "F32":
        raise CheckpointError(f"[gguf] expected F32 for {name!r}, got {file.tensors[name].type.name}.")
    return np.frombuffer(file.rows(name).tobytes(), "<f4")


def _particulars(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Entries that single architectures compute from others."""
    kind, layers = config["model_type"], config["num_hidden_layers"]
    if kind in ("gemma2", "gemma3_text"):
        # llama.cpp's rule: only the 27B models (46 and 62 layers) do not scale by the head size.
        largest = layers == {"gemma2": 46, "gemma3_text": 62}[kind]
        scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
        return {"query_pre_attn_scalar": scalar}
    if kind == "phi3":
        original = file.get("rope.scaling.original_context_length", config["max_position_embeddings"])
        rotated = int(file.get("rope.dimension_count", config["head_dim"]))
        return {
            "original_max_position_embeddings": int(original),
            "partial_rotary_factor": rotated / config["head_dim"],
        }
    return {}
