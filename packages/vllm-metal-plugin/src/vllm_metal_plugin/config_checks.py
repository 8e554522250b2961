"""What the plugin refuses when vLLM builds its configuration, each with one clear sentence."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vllm_metal_plugin.cache_formats import CacheFormats
from vllm_metal_plugin.envs import MetalEnvs
from vllm_metal_plugin.errors import UnsupportedConfigError
from vllm_metal_plugin.spec_decode.proposer import PROPOSERS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

ENCODERS = frozenset(
    {
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertModel",
        "BgeM3EmbeddingModel",
        "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification",
        "ModernBertModel",
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaModel",
        "XLMRobertaForSequenceClassification",
        "XLMRobertaForTokenClassification",
        "XLMRobertaModel",
    }
)
"""Architectures, by vLLM's names, of models that take a prompt whole and keep nothing of it."""
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


def encodes(config: "VllmConfig") -> bool:
    """Whether the model is an encoder that the plugin has."""
    model = config.model_config
    return model is not None and model.runner_type == "pooling" and model.architecture in ENCODERS


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


def _speculation(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    if config.speculative_config is None:
        return
    method = config.speculative_config.method
    if method not in PROPOSERS:
        yield (
            f"expected --speculative-config with method {' or '.join(PROPOSERS)}, got {method}. Other drafts are not "
            "supported in this version: change the method or drop the option."
        )
    if not envs.use_paged_attention:
        yield (
            "expected no --speculative-config with VLLM_METAL_USE_PAGED_ATTENTION=0. Wrong drafts can be taken back "
            "from pages only: drop one of the two."
        )


def _model(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    model = config.model_config
    if model is None:
        return
    if model.is_encoder_decoder:
        yield (f"expected a decoder-only model, got {model.architecture}. Encoder-decoder models are not supported.")
    if model.logits_processors:
        yield (
            "expected no --logits-processors. Those classes are torch modules and logits live in MLX; use "
            "logit_bias, allowed_token_ids or structured outputs."
        )
    if model.enable_prompt_embeds:
        yield "expected no --enable-prompt-embeds. Prompts are token ids in this version; drop the option."


def _pooling(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    model = config.model_config
    if model is None or model.runner_type != "pooling":
        return
    yield from _converted(model) if encodes(config) else _decoder(model)
    pooling = model.pooler_config.seq_pooling_type
    if config.scheduler_config.enable_chunked_prefill and not model.is_chunked_prefill_supported:
        yield f"expected no --enable-chunked-prefill with {pooling} pooling, which takes a prompt whole. Drop it."
    if config.cache_config.enable_prefix_caching and not model.is_prefix_caching_supported:
        yield f"expected no --enable-prefix-caching with {pooling} pooling, which takes a prompt whole. Drop it."


def _converted(model: "ModelConfig") -> Iterator[str]:
    # vLLM's own ModernBertModel has no pooler: it is converted to one that embeds, which ours is anyway.
    embeds = model.convert_type == "embed" and model.architecture.endswith("Model")
    if model.convert_type != "none" and not embeds:
        yield (
            f"expected no --convert with {model.architecture}, got {model.convert_type}. Use a checkpoint of the "
            "architecture that does this."
        )


def _decoder(model: "ModelConfig") -> Iterator[str]:
    if model.convert_type not in ("embed", "classify"):
        yield (
            f"expected an architecture that vLLM makes a pooling model of, got {model.architecture}, which is one "
            "with code of its own. Use BERT, RoBERTa, XLM-RoBERTa, ModernBERT, or a model whose decoder generates "
            "text, such as Qwen3-Embedding."
        )
    if model.attn_type == "encoder_only":
        yield (
            f"expected a model whose tokens see the ones before them, got {model.architecture}, whose tokens see all. "
            "Bidirectional attention of this architecture is not supported in this version."
        )


def _lora(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    lora = config.lora_config
    if lora is None:
        return
    if lora.target_modules is not None:
        yield (
            f"expected no --lora-target-modules, got {', '.join(lora.target_modules)}. An adapter is applied to all "
            "modules that it is for; drop the option."
        )
    if lora.enable_tower_connector_lora:
        yield "expected no --enable-tower-connector-lora. Adapters reach the language model; drop the option."


def _multimodal(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    multimodal = config.model_config and config.model_config.multimodal_config
    if multimodal is None:
        return
    if multimodal.enable_mm_embeds:
        yield "expected no --enable-mm-embeds. Images, video and sound are encoded here; drop the option."
    if multimodal.mm_encoder_only:
        yield "expected no --mm-encoder-only. Encoders run beside their language model; drop the option."
    if multimodal.is_multimodal_pruning_enabled():
        yield "expected no --video-pruning-rate. All frames are encoded; drop the option."


def _loading(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    load_format = str(config.load_config.load_format)
    if load_format not in LOAD_FORMATS:
        yield (f"expected --load-format to be one of {', '.join(LOAD_FORMATS)}, got {load_format}. Drop the option.")


def _device(config: "VllmConfig", envs: MetalEnvs) -> Iterator[str]:
    offload = config.offload_config
    for option, size in (
        ("--cpu-offload-gb", offload.uva.cpu_offload_gb),
        ("--offload-group-size", offload.prefetch.offload_group_size),
        ("--kv-offloading-size", config.cache_config.kv_offloading_size),
    ):
        if size:
            yield (
                f"expected no {option}, got {size:g}. Weights and cache stay where MLX computes: drop the option, or "
                "choose a smaller or more quantised model."
            )


CHECKS: tuple[Callable[["VllmConfig", MetalEnvs], Iterator[str]], ...] = (
    _paged,
    _parallel,
    _features,
    _speculation,
    _model,
    _pooling,
    _lora,
    _multimodal,
    _loading,
    _device,
)
