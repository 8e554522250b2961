"""mlx-lm's models over a paged KV cache: ragged batches, GGUF and safetensors loading."""

import metal_kernels  # noqa: F401  first: chooses the BLAS before MLX is imported
from metal_models.encoder import EncoderModel, load_encoder
from metal_models.errors import AdapterError, CheckpointError, MetalModelsError, UnsupportedModelError
from metal_models.loader import load
from metal_models.model import PagedModel
from metal_models.registry import supported

__all__ = [
    "AdapterError",
    "CheckpointError",
    "EncoderModel",
    "MetalModelsError",
    "PagedModel",
    "UnsupportedModelError",
    "load",
    "load_encoder",
    "supported",
]
