"""What vLLM asks about the device, and what it must change in its configuration for MLX."""

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER_CLS = "vllm_metal_plugin.worker.MetalWorker"
ENCODER_WORKER_CLS = "vllm_metal_plugin.encoder_worker.EncoderWorker"
ATTENTION_BACKEND = "vllm_metal_plugin.attention_backend.SyntheticBackend"


class MetalPlatform(Platform):  # type: ignore[misc]
    """MLX as a vLLM platform.

    For torch the device is the CPU: tensors only cross the border between vLLM and MLX there.
    ``check_and_update_config`` runs several times on one configuration and gives the same result each time.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    ray_device_key = "mlx"
    device_control_env_var = "VLLM_METAL_VISIBLE_DEVICES"
    simple_compile_backend = "eager"
    supported_quantization: list[str] = []  # noqa: RUF012  the base class declares it so
    _vocab_size: int | None = None

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """Dtypes of weights and activations; the first replaces a checkpoint dtype outside the list.

        MLX's half-precision matrix products on a CPU are several times slower than float32.
        """
        from vllm_metal_plugin.device import select_device

        if select_device() == "cpu":
            return [torch.float32]
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Name of the device for logs and usage statistics."""
        from vllm_metal_plugin import device

        return device.device_name(device.select_device())

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        """A machine has one MLX device: its name identifies it."""
        return f"{cls.get_device_name(device_id)}:{device_id}"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Bytes that MLX may plan with."""
        from vllm_metal_plugin import device

        return device.total_memory_bytes(device.select_device())

    @classmethod
    def import_kernels(cls) -> None:
        """There are no compiled torch kernels to import."""

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """MLX has one device per process."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Random numbers come from one generator per request."""

    @classmethod
    def inference_mode(cls) -> Any:
        """Torch code in this process never needs gradients."""
        return torch.no_grad()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """Torch tensors are not copied to a device."""
        return False

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """Groups of layers with different cache kinds share one pool."""
        return True

    @classmethod
    def use_custom_allreduce(cls) -> bool:
        """There are no CUDA collectives."""
        return False

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        """Only torch kernels ask; one unit makes them serial."""
        return 1

    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        """Class path of the backend that answers vLLM's questions about block sizes."""
        return ATTENTION_BACKEND

    @classmethod
    def _find_non_ssm_backends(cls, vllm_config: "VllmConfig") -> list[Any]:
        from vllm_metal_plugin.attention_backend import SyntheticBackend

        return [SyntheticBackend]

    @classmethod
    def _align_hybrid_block_size(cls, vllm_config: "VllmConfig", backend_cls: Any) -> None:
        """Nothing here: the worker plans pages from the states that the MLX model keeps."""

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Let the command line take vLLM's former short form of limits."""
        from vllm_metal_plugin.multimodal.short_limits import accept_short_limits

        if parser is not None:
            accept_short_limits(parser)

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Refuse a request that the runner cannot compute; the client gets HTTP 400 with the reason."""
        from vllm_metal_plugin.request_checks import check_request

        check_request(processed_inputs, params, cls._vocab_size)

    @classmethod
    def register_custom_kv_cache_specs(cls, vllm_config: "VllmConfig") -> None:
        """Called once in the process that has the scheduler, before the scheduler is made."""
        from vllm_metal_plugin import upstream_fixes

        upstream_fixes.install_in_engine_core()

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Refuse what the plugin cannot do and point vLLM at its worker."""
        from vllm.config import CompilationMode

        from vllm_metal_plugin.config_checks import check_config, encodes
        from vllm_metal_plugin.envs import read_envs

        envs = read_envs()
        check_config(vllm_config, envs)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        vllm_config.compilation_config.mode = CompilationMode.NONE
        model = vllm_config.model_config
        if model is not None:
            cls._vocab_size = model.get_vocab_size()
            if model.multimodal_config is not None:
                _prepare_multimodal(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls != "auto":
            return
        # First pass only: the engine writes the block size of the cache groups into the same field later.
        encoder = encodes(vllm_config)
        parallel.worker_cls = ENCODER_WORKER_CLS if encoder else WORKER_CLS
        if encoder:
            _bound_length(vllm_config)
            return
        cache = vllm_config.cache_config
        if envs.block_size is not None and not cache.user_specified_block_size:
            cache.block_size = envs.block_size
        if envs.prefix_cache is not None:
            cache.enable_prefix_caching = envs.prefix_cache
        if model is not None:
            _cache_states_with_prefixes(vllm_config)
        if not envs.use_paged_attention:
            _leave_prefixes_to_the_worker(vllm_config)


def _bound_length(vllm_config: "VllmConfig") -> None:
    """Keep prompts within the positions that an encoder has, of which vLLM takes RoBERTa's first two for usable."""
    from metal_models.encoders import max_length

    model = vllm_config.model_config
    longest = max_length(model.hf_config.to_dict())
    if model.max_model_len > longest:
        model.max_model_len = longest
        vllm_config.scheduler_config.max_model_len = longest


def _prepare_multimodal(vllm_config: "VllmConfig") -> None:
    """Let processors do all that they can, and keep items whole whose tokens see each other."""
    model = vllm_config.model_config
    model.multimodal_config.mm_device_do_normalize = False
    if model.runner_type == "pooling":
        model.multimodal_config.language_model_only = True
    elif model.is_mm_prefix_lm and model.supports_multimodal_inputs:
        from vllm_metal_plugin.multimodal.whole_items import keep_items_whole

        keep_items_whole(vllm_config)


def _leave_prefixes_to_the_worker(vllm_config: "VllmConfig") -> None:
    """Blocks are not where contiguous caches are: the scheduler must not skip a prompt's tokens because of them."""
    from vllm_metal_plugin.config import CONTIGUOUS_PREFIX_CACHE

    cache = vllm_config.cache_config
    vllm_config.additional_config = {
        **(vllm_config.additional_config or {}),
        CONTIGUOUS_PREFIX_CACHE: bool(cache.enable_prefix_caching),
    }
    cache.enable_prefix_caching = False
    if cache.mamba_cache_mode != "none" and vllm_config.model_config is not None:
        cache.mamba_cache_mode = "none"
        cache.mamba_block_size = vllm_config.model_config.max_model_len


def _cache_states_with_prefixes(vllm_config: "VllmConfig") -> None:
    """Set the prefix caching of recurrent states up as vLLM does for architectures that it knows to have them."""
    from vllm_metal_plugin.log import metal_logger
    from vllm_metal_plugin.preflight import keeps_states

    cache = vllm_config.cache_config
    if (
        cache.enable_prefix_caching
        and vllm_config.speculative_config is not None
        and keeps_states(vllm_config.model_config.model)
    ):
        metal_logger(__name__).info("Prefix caching is off: drafts may have to be taken back from recurrent states")
        cache.enable_prefix_caching = False
    if (
        cache.enable_prefix_caching
        and cache.mamba_cache_mode == "none"
        and keeps_states(vllm_config.model_config.model)
    ):
        if vllm_config.scheduler_config.enable_chunked_prefill:
            cache.mamba_cache_mode = "align"
        else:
            metal_logger(__name__).info(
                "Prefix caching is off: with recurrent layers it needs chunked prefill (--enable-chunked-prefill)"
            )
            cache.enable_prefix_caching = False
    elif not cache.enable_prefix_caching and cache.mamba_cache_mode != "none":
        cache.mamba_cache_mode = "none"
        cache.mamba_block_size = vllm_config.model_config.max_model_len
