"""GGUF files as models: their config, their weights, and a model directory for front ends."""

from metal_models.gguf.config import find_gguf, gguf_config
from metal_models.gguf.load import load_gguf
from metal_models.gguf.sidecar import write_sidecar

__all__ = ["find_gguf", "gguf_config", "load_gguf", "write_sidecar"]
