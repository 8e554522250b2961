"""What the worker's parts need to know, frozen, built once from vLLM's configuration and the environment."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_metal_plugin.cache_formats import CacheFormats
from vllm_metal_plugin.envs import MetalEnvs, read_envs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONTIGUOUS_PREFIX_CACHE = "contiguous_prefix_cache"
"""Key of ``additional_config``: whether the worker keeps prefixes of contiguous caches."""


@dataclass(frozen=True)
class MetalConfig:
    """Sizes of a step and of a sequence.

    Attributes:
        max_num_tokens: Token rows of the largest step.
        max_num_reqs: Requests that run at a time.
        cache_formats: How keys and values are cached.
        keep_prefixes: Whether prompts' prefixes are kept beside contiguous caches.
    """

    envs: MetalEnvs
    max_num_tokens: int
    max_num_reqs: int
    logprobs_mode: str
    cache_formats: CacheFormats
    keep_prefixes: bool

    @classmethod
    def from_vllm(cls, vllm_config: "VllmConfig") -> "MetalConfig":
        """Read vLLM's configuration and the environment."""
        scheduler = vllm_config.scheduler_config
        return cls(
            envs=read_envs(),
            max_num_tokens=scheduler.max_num_batched_tokens,
            max_num_reqs=scheduler.max_num_seqs,
            logprobs_mode=str(vllm_config.model_config.logprobs_mode),
            cache_formats=CacheFormats.from_vllm(vllm_config),
            keep_prefixes=bool((vllm_config.additional_config or {}).get(CONTIGUOUS_PREFIX_CACHE, False)),
        )
