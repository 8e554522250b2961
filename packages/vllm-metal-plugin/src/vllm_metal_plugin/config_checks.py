"""What the plugin refuses when vLLM builds its configuration, each with one clear sentence."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vllm_metal_plugin.cache_formats import CacheFormats
from vllm_metal_plugin.envs import MetalEnvs
from vllm_metal_plugin.errors import UnsupportedConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOAD_FORMATS = ("auto", "hf", "safetensors", "mlx", "gguf")


def check_config(vllm_config: "VllmConfig", envs: MetalEnvs) -> None:
    """Raise on the first thing that the plugin does not do.

    Raises:
        UnsupportedConfigError: Names the option, the value it has and the one it may have.
    """
    for check in CHECKS:
        for problem in check(vllm_config, envs):
            raise UnsupportedConfigError(f"[config] {problem}")
    CacheFormats.from_vllm(vllm_config)


def _paged(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    if not envs.use_paged_attention and CacheFormats.from_vllm(config) != CacheFormats():
        yield (
            f"expected --kv-cache-dtype auto with VLLM_METAL_USE_PAGED_ATTENTION=0, got "
            f"{CacheFormats.from_vllm(config)}. Only pages are quantised: drop one of the two."
        )


def _parallel(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    parallel = config.parallel_config
    for option, size in (
        ("--tensor-parallel-size", parallel.tensor_parallel_size),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--prefill-context-parallel-size", getattr(parallel, "prefill_context_parallel_size", 1)),
        ("--decode-context-parallel-size", getattr(parallel, "decode_context_parallel_size", 1)),
    ):
        if size > 1:
            yield (f"expected {option} 1, got {size}. One model runs on one device in this version; drop the option.")
    if parallel.enable_expert_parallel:
        yield ("expected no --enable-expert-parallel. One model runs on one device in this version; drop the option.")


def _features(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    if config.kv_transfer_config is not None:
        connector = config.kv_transfer_config.kv_connector
        yield (f"expected no --kv-transfer-config, got connector {connector}. KV transfer is not supported; drop it.")
    if config.lora_config is not None:
        yield "expected no --enable-lora. LoRA adapters are not supported in this version; drop the option."
    if config.speculative_config is not None:
        method = config.speculative_config.method
        yield (f"expected no --speculative-config, got method {method}. It is not supported in this version; drop it.")


def _model(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    model = config.model_config
    if model is None:
        return
    if model.runner_type != "generate":
        yield (
            f"expected a model that generates text, got --runner {model.runner_type}. "
            "Pooling models are not supported in this version."
        )
    if model.is_encoder_decoder:
        yield (f"expected a decoder-only model, got {model.architecture}. Encoder-decoder models are not supported.")
    if model.logits_processors:
        yield (
            "expected no --logits-processors. Those classes are torch modules and logits live in MLX; use "
            "logit_bias, allowed_token_ids or structured outputs."
        )
    if model.enable_prompt_embeds:
        yield "expected no --enable-prompt-embeds. Prompts are token ids in this version; drop the option."


def _loading(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    load_format = str(config.load_config.load_format)
    if load_format not in LOAD_FORMATS:
        yield (f"expected --load-format to be one of {', '.join(LOAD_FORMATS)}, got {load_format}. Drop the option.")


CHECKS: tuple[Callable[["VllmConfig", MetalEnvs], Iterator[str]], ...] = (
    _paged,
    _parallel,
    _features,
    _model,
    _loading,
)
