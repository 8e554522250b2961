"""In which formats the user wants keys and values cached."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from metal_kernels import ElementFormat
from vllm_metal_plugin.errors import UnsupportedConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM's names; scales are per token and head whatever the name says.
VLLM_NAMES: dict[str, ElementFormat | None] = {
    "auto": None,
    "float16": None,
    "bfloat16": None,
    "float32": None,
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_per_token_head": "fp8_e4m3",
    "int8_per_token_head": "int8",
    "int4_per_token_head": "int4",
}
_PLAIN = ("float16", "bfloat16", "float32")
OPTION = "kv_cache_dtype"
"""Key of ``--additional-config``: a format, or formats of "key" and "value"."""


@dataclass(frozen=True)
class CacheFormats:
    """Formats of cached keys and values; None for the model's own dtype."""

    key: ElementFormat | None = None
    value: ElementFormat | None = None

    @classmethod
    def from_vllm(cls, vllm_config: "VllmConfig") -> "CacheFormats":
        """Read ``--additional-config``, which wins, and ``--kv-cache-dtype``.

        Raises:
            UnsupportedConfigError: A name that is not a format, or layers to skip.
        """
        cache = vllm_config.cache_config
        name = str(cache.cache_dtype)
        if name not in VLLM_NAMES:
            raise UnsupportedConfigError(
                f"[config] expected --kv-cache-dtype to be one of {', '.join(VLLM_NAMES)}, got {name}. Choose one of "
                "these, or auto for the model's own dtype."
            )
        model = vllm_config.model_config
        if name in _PLAIN and model is not None and str(model.dtype) != f"torch.{name}":
            raise UnsupportedConfigError(
                "[config] expected --kv-cache-dtype auto, or a smaller format, with a model that computes in "
                f"{str(model.dtype).removeprefix('torch.')}, got {name}. Choose fp8 or int8_per_token_head, or auto."
            )
        both = VLLM_NAMES[name]
        formats = _parse((vllm_config.additional_config or {}).get(OPTION), both)
        if formats != cls() and cache.kv_cache_dtype_skip_layers:
            raise UnsupportedConfigError(
                f"[config] expected no --kv-cache-dtype-skip-layers, got {cache.kv_cache_dtype_skip_layers}. "
                "All layers are cached in one format: drop the option."
            )
        return formats


def _parse(option: Any, default: ElementFormat | None) -> CacheFormats:
    if option is None:
        return CacheFormats(default, default)
    parts = option if isinstance(option, dict) else {"key": option, "value": option}
    formats = {"key": default, "value": default} | parts
    for half, element in formats.items():
        if half not in ("key", "value") or element not in (None, *get_args(ElementFormat)):
            raise UnsupportedConfigError(
                f"[config] expected {OPTION} of --additional-config to be one of "
                f"{', '.join(get_args(ElementFormat))}, "
                f'or {{"key": …, "value": …}} of these, got {option!r}. Correct it.'
            )
    return CacheFormats(**formats)
