"""What vLLM is told about quantised checkpoints: that the worker reads them, whatever their format."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization import QuantizationConfig, register_quantization_config

QUANTIZATION = "mlx"
"""vLLM's ``quantization`` for every checkpoint whose ``config.json`` names a ``quant_method``."""

_registered = False


class MLXConfig(QuantizationConfig):  # type: ignore[misc]
    """Accepts the settings of every format.

    vLLM's own classes check what torch kernels need of GPUs and dtypes. Formats that the worker does not read are
    refused before, when the model's files are checked.
    """

    @classmethod
    def get_name(cls) -> str:
        """Name of the method."""
        return QUANTIZATION

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """No device is too old."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Nothing is read but ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MLXConfig":
        """Take any settings."""
        return cls()

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> str | None:
        """Claim every checkpoint that names a method."""
        return QUANTIZATION if (hf_quant_cfg or {}).get("quant_method") else None

    def get_quant_method(self, layer: Any, prefix: str) -> None:
        """There are no torch layers."""


def register() -> None:
    """Let vLLM pass quantised checkpoints on; safe to repeat."""
    global _registered
    if not _registered:
        _registered = True
        register_quantization_config(QUANTIZATION)(MLXConfig)
