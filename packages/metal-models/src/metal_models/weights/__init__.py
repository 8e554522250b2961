"""Quantised checkpoints of other libraries: each format a file, each a line in ``formats.FORMATS``."""

from metal_models.weights.conversion import Conversion, converting, quantization_of
from metal_models.weights.formats import FORMATS, NATIVE, CheckpointFormat, config_dtype, format_of, own_quantization

__all__ = [
    "FORMATS",
    "NATIVE",
    "CheckpointFormat",
    "Conversion",
    "config_dtype",
    "converting",
    "format_of",
    "own_quantization",
    "quantization_of",
]
