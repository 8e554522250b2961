"""The worker of a model that takes prompts whole and has no cache."""

import time
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from vllm.v1.worker.worker_base import CompilationTimes

from metal_kv import NotEnoughMemoryError
from metal_models import load_encoder
from vllm_metal_plugin import kv_cache, memory
from vllm_metal_plugin.encoder_forward import EncoderForward
from vllm_metal_plugin.forward_pass import ForwardPass
from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.log import metal_logger
from vllm_metal_plugin.lora import LoraAdapters, LoraForward
from vllm_metal_plugin.sampling import PromptLogprobs, SamplingState
from vllm_metal_plugin.worker import MetalWorker

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = metal_logger(__name__)


class EncoderWorker(MetalWorker):
    """Runs an encoder and pools what it returns.

    vLLM asks a worker without a cache for no memory: what a step takes is measured and checked here.
    """

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the encoder from its local directory."""
        start = time.perf_counter()
        path = self.model_config.model
        self.encoder = load_encoder(path, dtype=kv_cache.to_mlx_dtype(self.model_config.dtype))
        logger.info("Loaded %s: %.2f GB in %.1f s", path, self.encoder.nbytes / 1e9, time.perf_counter() - start)
        self.adapters = LoraAdapters.from_vllm(self.encoder.lora, self.lora_config)

    def get_kv_cache_spec(self) -> dict[str, "KVCacheSpec"]:
        """Nothing is cached."""
        return {}

    def determine_available_memory(self) -> int:
        """Nothing is cached."""
        return 0

    def initialize_from_config(self, kv_cache_config: "KVCacheConfig") -> None:
        """Put the runner together."""
        from vllm_metal_plugin.encoder_pooler import build_encoder_pooler
        from vllm_metal_plugin.pooling_runner import PoolingRunner

        vocab_size, mode = self.encoder.vocab_size, self.config.logprobs_mode
        batch = InputBatch(
            max_reqs=self.config.max_num_reqs,
            max_blocks=[],
            sampling=SamplingState(self.config.max_num_reqs, vocab_size, seed=self.model_config.seed),
            new_prompt_logprobs=lambda num_prompt_tokens, k: PromptLogprobs(num_prompt_tokens, k, vocab_size, mode),
        )
        forward_pass: ForwardPass = EncoderForward(self.encoder)
        if self.lora_config is not None:
            forward_pass = LoraForward(forward_pass, self.encoder.lora, self.adapters)
        pooler = build_encoder_pooler(self.vllm_config, self.encoder)
        self.runner = PoolingRunner(forward_pass, batch, pooler, block_sizes=[])

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compute a worst-case step, or on a CPU a small one, and check that it fits beside the weights.

        Raises:
            NotEnoughMemoryError: It does not.
        """
        start = time.perf_counter()
        step_bytes = self._measure_step_bytes()
        limit = memory.memory_limit(self.target, self.cache_config, self.config.envs, self.encoder.nbytes)
        usable, needed = int(limit.total_bytes * limit.fraction), self.encoder.nbytes + self.adapters.reserved_bytes
        logger.info(
            "Encoder memory: %.2f GB usable, %.2f GB weights, %.2f GB for a step of %d tokens; there is no KV cache",
            *(size / 1e9 for size in (usable, needed, step_bytes)),
            self.config.max_num_tokens,
        )
        if needed + step_bytes > usable:
            raise NotEnoughMemoryError(
                f"[memory] expected room for {(needed + step_bytes) / 1e9:.2f} GB of weights and one step, got "
                f"{usable / 1e9:.2f} GB. Lower --max-num-batched-tokens and --max-model-len, or raise "
                "VLLM_METAL_MEMORY_FRACTION."
            )
        mx.set_cache_limit(max(memory.LEAST_BUFFER_CACHE_BYTES, step_bytes))
        return CompilationTimes(language_model=time.perf_counter() - start, encoder=0.0)

    def _measure_step_bytes(self) -> int:
        """Return the peak of a step of as many prompts of full length as fit in one, beyond what is held before it."""
        tokens = self.config.max_num_tokens
        rows = min(tokens, memory.PROFILE_ROWS_ON_CPU) if self.target == "cpu" else tokens
        longest = max(1, min(rows, self.model_config.max_model_len))
        starts = np.append(np.arange(0, rows, longest), rows).astype(np.int32)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(self.encoder.forward(mx.zeros((rows,), mx.int32), starts))
        step_bytes = max(0, mx.get_peak_memory() - before)
        mx.clear_cache()
        if rows == tokens:
            return step_bytes
        return step_bytes * tokens // rows + self.encoder.score_bytes(tokens, self.model_config.max_model_len)
