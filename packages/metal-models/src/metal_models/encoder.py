"""A model that turns a prompt into hidden rows at once and keeps nothing of it: BERT and its relatives."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int32
from mlx.utils import tree_flatten

from metal_models import torch_files
from metal_models.checkpoint import check_files, read_config
from metal_models.encoders import build_encoder, family
from metal_models.encoders.names import Tensors
from metal_models.encoders.ragged import MAX_SCORES, RaggedSequences
from metal_models.errors import CheckpointError
from metal_models.lora import LoraLayers
from metal_models.stored_quantization import quantize_as_stored

# Files of heads beside the weights of BGE-M3, and what their tensors are called here.
_HEAD_FILES = {"sparse_linear.pt": "sparse_linear.", "colbert_linear.pt": "colbert_linear."}


class EncoderModel:
    """A loaded encoder.

    Args:
        module: A model of ``metal_models.encoders``.
        config: As in the model's ``config.json``.
        heads: Tensors of the heads that the checkpoint has, under its names for them: they are not applied here.

    Attributes:
        module: The encoder.
        config: The config.
        heads: The heads' tensors.
        vocab_size: Rows of the embedding.
        hidden_size: Width of a hidden row.
        max_length: Tokens of the longest sequence.
        dtype: Of hidden rows.
        nbytes: Size of the parameters.
        lora: Its LoRA adapters; a step of rows that use some is computed within ``lora.applied``.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any], heads: Tensors | None = None) -> None:
        arrays: Any = tree_flatten(module.parameters())
        self.module: Any = module
        self.config = config
        self.heads = heads or {}
        self.vocab_size = int(self.module.args.vocab_size)
        self.hidden_size = int(self.module.args.hidden_size)
        self.max_length = int(self.module.args.max_length)
        norms = [array for name, array in arrays if array.ndim == 1]
        self.dtype = norms[0].dtype
        self.nbytes = sum(array.nbytes for _, array in arrays)
        self.lora = LoraLayers(module, self.dtype)

    def forward(
        self,
        token_ids: Int32[mx.array, "tokens"],
        query_start_loc: Int32[np.ndarray, "reqs_plus_1"],
        token_types: Int32[mx.array, "tokens"] | None = None,
    ) -> Float[mx.array, "tokens hidden"]:
        """Return the hidden rows of whole sequences, lazily.

        Args:
            token_ids: Ids of all sequences, one after the other.
            query_start_loc: Row at which each sequence starts, and their number of rows.
            token_types: Segment of each token, for models that tell two texts apart by it; None for 0.
        """
        rows: mx.array = self.module(token_ids, RaggedSequences(query_start_loc), token_types)
        return rows

    def score_bytes(self, num_tokens: int, max_length: int) -> int:
        """Return the most bytes that products of queries and keys take in a step, on devices that hold them at once.

        Args:
            num_tokens: Rows of the step.
            max_length: Tokens of its longest sequence.
        """
        heads = int(self.module.args.num_attention_heads)
        return 2 * mx.float32.size * min(MAX_SCORES, heads * num_tokens * min(num_tokens, max_length))


def load_encoder(path: str | Path, *, dtype: mx.Dtype | None = None) -> EncoderModel:
    """Load an encoder and evaluate its parameters.

    Args:
        path: A directory in Hugging Face's form: safetensors, quantised by MLX or not, or PyTorch files.
        dtype: Type to cast floating-point parameters to; by default they stay as stored. Heads stay as stored.

    Raises:
        UnsupportedModelError: The architecture is no encoder that is known.
        CheckpointError: A file is missing or damaged, or a tensor is missing, too many or misshapen.
    """
    path = Path(path)
    config = read_config(path)
    module = build_encoder(config)
    check_files(path, torch_files=True)
    tensors, heads = family(config).NAMES.divide(_read_weights(path))
    quantization = config.get("quantization")
    if quantization:
        heads = _dequantized(heads, quantization)
        quantize_as_stored(module, tensors, quantization)
    try:
        module.load_weights(list(tensors.items()), strict=True)
    except ValueError as error:
        lines = [line.strip().rstrip(",.") for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"[load] expected tensors that fit {config['model_type']!r} in {path}, got: {', '.join(lines[:4])}. "
            "Check that the files belong together, or download them again."
        ) from error
    if dtype is not None:
        module.set_dtype(dtype)
    mx.eval(module.parameters(), heads)
    return EncoderModel(module, config, heads)


def _read_weights(path: Path) -> Tensors:
    files = sorted(path.glob("model*.safetensors"))
    tensors: Tensors = {}
    for file in files:
        part: Any = mx.load(str(file))
        tensors.update(part)
    if not files:
        for file in sorted(path.glob("pytorch_model*.bin")):
            tensors.update(torch_files.read_tensors(file))
    for name, prefix in _HEAD_FILES.items():
        if (path / name).exists():
            part = torch_files.read_tensors(path / name)
            tensors.update({f"{prefix}{key}": array for key, array in part.items()})
    return tensors


def _dequantized(heads: Tensors, quantization: dict[str, Any]) -> Tensors:
    """Return heads, which are small, as floats."""
    plain = {name: array for name, array in heads.items() if not name.endswith((".scales", ".biases"))}
    for name in plain:
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in heads:
            plain[name] = mx.dequantize(
                heads[name],
                heads[f"{stem}.scales"],
                heads.get(f"{stem}.biases"),
                group_size=quantization["group_size"],
                bits=quantization["bits"],
                mode=quantization.get("mode", "affine"),
            )
    return plain
