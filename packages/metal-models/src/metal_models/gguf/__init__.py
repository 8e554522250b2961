"""GGUF files as models: their config, their weights, and a model directory for front ends."""

from metal_models.gguf.config import find_gguf, gguf_config
from metal_models.gguf.load import load_gguf

__all__ = ["find_gguf", "gguf_config", "load_gguf"]
