"""One typed table of the environment variables that the plugin reads."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_metal_plugin.errors import EnvironmentVariableError

Device = Literal["gpu", "cpu"]
MultimodalMode = Literal["auto", "text-only-compat", "multimodal-native"]


@dataclass(frozen=True)
class MetalEnvs:
    """The values of all variables, read once at the edge of a process."""

    memory_fraction: float | None
    wired_memory: bool
    use_mlx: bool
    device: Device | None
    block_size: int | None
    use_paged_attention: bool
    debug: bool
    multimodal_mode: MultimodalMode
    use_modelscope: bool
    modelscope_cache: str | None
    prefix_cache: bool | None
    prefix_cache_fraction: float
    gdn_lazy_kernels: bool
    mla_kernel: bool | None
    compiled_decode: bool | None
    visible_devices: str | None


@dataclass(frozen=True)
class EnvVar:
    """One row of the table.

    ``default`` is the text shown to users; an unset variable parses to ``unset``. ``parse`` raises
    ``ValueError`` for a text outside ``allowed``.
    """

    name: str
    field: str
    parse: Callable[[str], Any]
    allowed: str
    default: str
    unset: Any
    doc: str


_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def _flag(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(text)
    return word in _TRUE


def _optional_flag(text: str) -> bool | None:
    return None if text.strip().lower() == "auto" else _flag(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise ValueError(text)
    return value


def _optional_fraction(text: str) -> float | None:
    return None if text.strip().lower() == "auto" else _fraction(text)


def _block_size(text: str) -> int:
    value = int(text)
    if value < 8 or value > 512 or value & (value - 1):
        raise ValueError(text)
    return value


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        word = text.strip().lower()
        if word not in words:
            raise ValueError(text)
        return word

    return parse


def _text(text: str) -> str | None:
    return text or None


_BOOL = "0 or 1"

TABLE: tuple[EnvVar, ...] = (
    EnvVar(
        "VLLM_METAL_MEMORY_FRACTION", "memory_fraction", _optional_fraction,
        "auto or a number in (0, 1]", "auto", None,
        "Share of the device's memory for weights, activations and KV cache together. `auto` takes "
        "`--gpu-memory-utilization` when it was passed, else 0.9 on a GPU; on a CPU half of the memory "
        "that is free, and at most 4 GiB of KV cache.",
    ),
    EnvVar(
        "VLLM_METAL_WIRED_MEMORY", "wired_memory", _flag, _BOOL, "0", False,
        "Keep weights and KV cache wired, so that macOS never pages them out after an idle time. A risk: wired "
        "memory cannot be reclaimed, and Macs have panicked when it left the system too little; leave at least "
        "a quarter of the memory free. Metal only.",
    ),
    EnvVar(
        "VLLM_METAL_USE_MLX", "use_mlx", _flag, _BOOL, "1", True,
        "Run models with MLX. 0 leaves vLLM to its other platforms, as if the plugin were not installed.",
    ),
    EnvVar(
        "VLLM_MLX_DEVICE", "device", _one_of("gpu", "cpu"), "gpu or cpu", "gpu", None,
        "MLX device. Unset means the GPU where MLX has one and the CPU elsewhere.",
    ),
    EnvVar(
        "VLLM_METAL_BLOCK_SIZE", "block_size", _block_size, "a power of two in [8, 512]", "16", None,
        "Tokens in one KV-cache block; `--block-size` wins.",
    ),
    EnvVar(
        "VLLM_METAL_USE_PAGED_ATTENTION", "use_paged_attention", _flag, _BOOL, "1", True,
        "Keep the KV cache in pages. 0 keeps it in mlx-lm's own caches, one set for each request.",
    ),
    EnvVar(
        "VLLM_METAL_DEBUG", "debug", _flag, _BOOL, "0", False,
        "Log what each step computes and how long the host took to prepare it.",
    ),
    EnvVar(
        "VLLM_METAL_MULTIMODAL_MODE", "multimodal_mode",
        _one_of("auto", "text-only-compat", "multimodal-native"),
        "auto, text-only-compat or multimodal-native", "auto", "auto",
        "How checkpoints with a vision or audio part are served. `auto` takes images, video and sound where their "
        "encoder is supported, and serves the language model of Gemma 4, Qwen3.5 and Qwen3.6 alone where it is not; "
        "`text-only-compat` serves any language model alone; `multimodal-native` ends the launch where there is no "
        "encoder.",
    ),
    EnvVar(
        "VLLM_USE_MODELSCOPE", "use_modelscope", _flag, _BOOL, "False", False,
        "Take models from ModelScope instead of Hugging Face.",
    ),
    EnvVar(
        "VLLM_METAL_MODELSCOPE_CACHE", "modelscope_cache", _text, "a directory", "unset", None,
        "A further ModelScope cache, from which files are taken instead of fetched.",
    ),
    EnvVar(
        "VLLM_METAL_PREFIX_CACHE", "prefix_cache", _flag, _BOOL, "unset", None,
        "Reuse the cache of shared prompt prefixes: 1 and 0 do what `--enable-prefix-caching` and "
        "`--no-enable-prefix-caching` do, on both paths. Unset leaves vLLM's default (on).",
    ),
    EnvVar(
        "VLLM_METAL_PREFIX_CACHE_FRACTION", "prefix_cache_fraction", _fraction, "a number in (0, 1]", "0.05",
        0.05,
        "Share of the device's memory for prefixes on the contiguous path; pages are shared in place "
        "and need none.",
    ),
    EnvVar(
        "VLLM_METAL_GDN_LAZY_KERNELS", "gdn_lazy_kernels", _flag, _BOOL, "1", True,
        "Compute decode steps of gated-delta-net models with the GPU kernel that changes states in their pages, "
        "where it applies. With 0 they run on the model's own operations, over states copied out of pages and back.",
    ),
    EnvVar(
        "VLLM_METAL_MLA_KERNEL", "mla_kernel", _optional_flag, "auto, 0 or 1", "auto", None,
        "Use the GPU kernel for multi-head latent attention.",
    ),
    EnvVar(
        "VLLM_METAL_COMPILED_DECODE", "compiled_decode", _optional_flag, "auto, 0 or 1", "auto", None,
        "Compile decode steps on a GPU, once for each bucket of sizes. `auto` leaves out models with recurrent states "
        "that have no program of fused kernels (Jamba, RWKV 7, Kimi-Linear, …): 1 compiles those as well, 0 nothing.",
    ),
    EnvVar(
        "VLLM_METAL_VISIBLE_DEVICES", "visible_devices", _text, "device numbers", "unset", None,
        "Set by vLLM's executors for each worker; not for users.",
    ),
)  # fmt: skip


def read_envs(environ: Mapping[str, str] | None = None) -> MetalEnvs:
    """Parse all variables from ``environ`` (``os.environ`` when None).

    Raises:
        EnvironmentVariableError: A value is outside its allowed set, or two values contradict each other.
    """
    environ = os.environ if environ is None else environ
    values = {var.field: _read(var, environ) for var in TABLE}
    envs = MetalEnvs(**values)
    if envs.memory_fraction is not None and not envs.use_paged_attention:
        raise EnvironmentVariableError(
            f"[environment] expected VLLM_METAL_MEMORY_FRACTION=auto with "
            "VLLM_METAL_USE_PAGED_ATTENTION=0, got "
            f"{envs.memory_fraction:g}. Unset one of the two: a fraction is the budget of the paged cache."
        )
    return envs


def _read(var: EnvVar, environ: Mapping[str, str]) -> Any:
    text = environ.get(var.name)
    if text is None:
        return var.unset
    try:
        return var.parse(text)
    except ValueError:
        raise EnvironmentVariableError(
            f"[environment] expected {var.name} to be {var.allowed}, got {text!r}. "
            f"Correct it or unset it (default: {var.default})."
        ) from None


def register_with_vllm() -> None:
    """Make the names known to vLLM, whose environment check warns of VLLM_* variables it does not know."""
    from vllm import envs as vllm_envs

    for var in TABLE:
        vllm_envs.environment_variables.setdefault(var.name, lambda name=var.name: os.environ.get(name))
