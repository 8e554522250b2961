"""The life of one engine worker: device, model, cache, steps."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from vllm.v1.outputs import AsyncModelRunnerOutput, DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

import metal_models
from metal_kernels import CPU_BLAS
from metal_kernels.freed_memory import keep_freed_memory
from metal_kv import (
    CacheGroup,
    KVCachePool,
    MemoryBudget,
    PrefixTree,
    SpecError,
    bytes_per_block,
    max_blocks_per_request,
    quantize_specs,
)
from metal_models.contiguous import ContiguousModel, needs_state
from metal_models.multimodal import Towers, load_towers
from vllm_metal_plugin import kv_cache, memory
from vllm_metal_plugin.cache_formats import VLLM_NAMES, CacheFormats
from vllm_metal_plugin.config import MetalConfig
from vllm_metal_plugin.device import device_name, select_device, wire_memory
from vllm_metal_plugin.forward_pass import ContiguousForward, ForwardPass, PagedForward
from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.log import metal_logger
from vllm_metal_plugin.lora import LoraAdapters, LoraForward
from vllm_metal_plugin.model_runner import ModelRunner
from vllm_metal_plugin.multimodal.encoder_memory import measure_encoder
from vllm_metal_plugin.multimodal_forward import MultimodalForward
from vllm_metal_plugin.sampling import PromptLogprobs, Sampler, SamplingState
from vllm_metal_plugin.spec_decode.proposer import PROPOSERS
from vllm_metal_plugin.speculative_runner import MAX_SAVED_STATES, SpeculativeRunner

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from vllm_metal_plugin.pooling_runner import PoolingRunner

logger = metal_logger(__name__)


class MetalWorker(WorkerBase):  # type: ignore[misc]
    """Answers the engine's calls in the order in which vLLM makes them at start, then runs steps."""

    def init_device(self) -> None:
        """Choose the MLX device."""
        self.config = MetalConfig.from_vllm(self.vllm_config)
        self.target = select_device(self.config.envs)
        mx.set_cache_limit(memory.LEAST_BUFFER_CACHE_BYTES)
        logger.info("MLX %s on %s (%s)", version("mlx"), device_name(self.target), self.target)
        if self.target == "cpu":
            keep_freed_memory()
            logger.info("Matrix products on the CPU: %s", CPU_BLAS)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model from its local directory."""
        start = time.perf_counter()
        dtype = kv_cache.to_mlx_dtype(self.model_config.dtype)
        expand_to_bytes = memory.expanded_weights_limit(self.target, dtype)
        self.pools = self.model_config.runner_type == "pooling"
        self.model = metal_models.load(
            self.model_config.model,
            dtype=dtype,
            expand_to_bytes=expand_to_bytes,
            pooling=self.pools,
            mla_kernel=self.config.envs.mla_kernel is not False,
            gdn_kernel=self.config.envs.gdn_lazy_kernels,
            compiled_decode=self.config.envs.compiled_decode,
        )
        self.towers: Towers | None = None
        if self.model_config.supports_multimodal_inputs:
            self.towers = load_towers(self.model_config.model, self.model.config, dtype=dtype)
        logger.info(
            "Loaded %s: %.2f GB in %.1f s",
            self.model_config.model,
            self._weights_bytes / 1e9,
            time.perf_counter() - start,
        )
        self.adapters = LoraAdapters.from_vllm(self.model.lora, self.lora_config)

    @property
    def _weights_bytes(self) -> int:
        return self.model.nbytes + (self.towers.nbytes if self.towers is not None else 0)

    def get_kv_cache_spec(self) -> dict[str, "KVCacheSpec"]:
        """What the scheduler must know of each layer's cache."""
        formats = self.config.cache_formats
        specs = self.model.kv_cache_specs(self.cache_config.block_size)
        quantized = quantize_specs(specs, formats.key, formats.value)
        self.specs = kv_cache.plan_states(quantized, self.vllm_config)
        return kv_cache.to_vllm_specs(self.specs, self.vllm_config)

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Pages are ours alone: the name only has to be one that vLLM knows."""
        return ["LBNHC"]

    def set_kv_cache_layout(self, kv_cache_layout: str, *args: Any) -> None:
        """Record the layout; 0.33 passes one argument more."""
        super().set_kv_cache_layout(kv_cache_layout, *args)

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: as the user said, or what weights and one step leave of the budget.

        Raises:
            NotEnoughMemoryError: It does not hold one request; the text says what would help.
        """
        limit = memory.memory_limit(self.target, self.cache_config, self.config.envs, self._weights_bytes)
        self.prefix_bytes = int(limit.total_bytes * self._prefix_fraction())
        if self.cache_config.kv_cache_memory_bytes:
            return self._given_bytes(int(self.cache_config.kv_cache_memory_bytes), limit.total_bytes)
        overhead = memory.measure_step_bytes(
            self.model,
            self.specs,
            num_tokens=self.config.max_num_tokens,
            num_reqs=self.config.max_num_reqs,
            target=self.target,
        )
        if self.speculative_config is not None:
            overhead += min(self.config.max_num_reqs, MAX_SAVED_STATES) * kv_cache.state_bytes(self.specs)
        if self.towers is not None:
            overhead += measure_encoder(self.towers, self.vllm_config, on_cpu=self.target == "cpu").total_bytes
        # Buffers that a step frees are the next one's: MLX need not keep more of them than one step has.
        mx.set_cache_limit(max(memory.LEAST_BUFFER_CACHE_BYTES, overhead))
        groups = kv_cache.planned_groups(self.vllm_config, self.specs)
        budget = MemoryBudget.plan(
            limit.total_bytes,
            limit.fraction,
            model_memory=self._weights_bytes,
            overhead=overhead + self.adapters.reserved_bytes,
            per_block_bytes=bytes_per_block(groups),
            block_size=self.cache_config.block_size,
            kv_budget_limit=limit.kv_cache_cap_bytes,
        )
        logger.info("%s", budget)
        if not self.config.envs.use_paged_attention:
            share, self.prefix_bytes = memory.contiguous_shares(
                budget.kv_budget, limit.total_bytes, self._prefix_fraction()
            )
            logger.info(
                "Contiguous path: %.2f GB of that for requests' tokens, as much for growth and padding, %.2f GB for "
                "prefixes",
                share / 1e9,
                self.prefix_bytes / 1e9,
            )
            budget = replace(budget, kv_budget=share)
        self._require(budget, groups)
        return budget.kv_budget

    def _given_bytes(self, given: int, total_bytes: int) -> int:
        """Return what the user gives the cache, unless it is too little for one request; vLLM names another option."""
        groups = kv_cache.planned_groups(self.vllm_config, self.specs)
        budget = MemoryBudget.plan(
            total_bytes,
            1.0,
            model_memory=self._weights_bytes,
            overhead=0,
            per_block_bytes=bytes_per_block(groups),
            block_size=self.cache_config.block_size,
            kv_budget_limit=given,
        )
        if budget.kv_budget == given:
            self._require(budget, groups)
        return given

    def _prefix_fraction(self) -> float:
        return self.config.envs.prefix_cache_fraction if self.config.keep_prefixes else 0.0

    def _require(self, budget: MemoryBudget, groups: list[CacheGroup]) -> None:
        """Refuse a budget without room for one request of full length, unless vLLM chooses that length."""
        in_flight = self.vllm_config.max_in_flight_tokens
        chosen_later = (
            self.model_config.original_max_model_len == -1 or self.cache_config.num_gpu_blocks_override is not None
        )
        budget.require(
            None if chosen_later else self.model_config.max_model_len,
            lambda num_tokens: max_blocks_per_request(groups, num_tokens, in_flight),
            other_formats=self._other_formats(),
        )

    def _other_formats(self) -> dict[str, int]:
        """What else the user could set for the cache's format, and the bytes of a block then."""
        if self.config.cache_formats != CacheFormats() or not self.config.envs.use_paged_attention:
            return {}
        settings = {}
        for name in ("fp8", "int8_per_token_head", "int4_per_token_head"):
            try:
                specs = quantize_specs(self.specs, VLLM_NAMES[name], VLLM_NAMES[name])
                block_bytes = bytes_per_block(kv_cache.planned_groups(self.vllm_config, specs))
            except SpecError:  # latents, odd head sizes, pages that states share
                continue
            settings[f"--kv-cache-dtype {name}"] = block_bytes
        return settings

    def initialize_from_config(self, kv_cache_config: "KVCacheConfig") -> None:
        """Allocate the cache that vLLM planned and put the runner together."""
        if self.config.envs.wired_memory:
            cache_bytes = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
            logger.warning("%s", wire_memory(self.target, self._weights_bytes + cache_bytes))
        groups = kv_cache.to_groups(kv_cache_config, self.specs)
        kv_cache.log_block_translation(groups)
        vocab_size = self.model.vocab_size
        mode = self.config.logprobs_mode
        batch = InputBatch(
            max_reqs=self.config.max_num_reqs,
            max_blocks=[-(-self.model_config.max_model_len // group.block_size) + 1 for group in groups],
            kernel_blocks_per_block=[group.kernel_blocks_per_block for group in groups],
            sampling=SamplingState(self.config.max_num_reqs, vocab_size, seed=self.model_config.seed),
            new_prompt_logprobs=lambda num_prompt_tokens, k: PromptLogprobs(num_prompt_tokens, k, vocab_size, mode),
        )
        block_sizes = [
            group.block_size // group.kernel_blocks_per_block if group.keeps_rows else None for group in groups
        ]
        pages = forward_pass = self._forward_pass(kv_cache_config)
        self.multimodal: MultimodalForward | None = None
        if self.towers is not None:
            forward_pass = self.multimodal = MultimodalForward(forward_pass, self.towers)
        if self.lora_config is not None:
            forward_pass = LoraForward(forward_pass, self.model.lora, self.adapters)
        if self.pools:
            self.runner: ModelRunner | PoolingRunner = self._pooling_runner(forward_pass, batch, block_sizes)
            return
        new_runner = ModelRunner if self.speculative_config is None else self._speculative_runner(pages)
        self.runner = new_runner(
            forward_pass,
            batch,
            Sampler(vocab_size, mode),
            block_sizes=block_sizes,
            wait_before_dispatch=self.target == "cpu",
            debug=self.config.envs.debug,
        )

    def _speculative_runner(self, pages: ForwardPass) -> Callable[..., ModelRunner]:
        assert isinstance(pages, PagedForward), "contiguous caches are refused with drafts"
        speculative = self.speculative_config
        return partial(
            SpeculativeRunner,
            proposer=PROPOSERS[speculative.method](speculative),
            max_drafts=speculative.num_speculative_tokens,
            max_model_len=self.model_config.max_model_len,
            pool=pages.pool,
        )

    def _pooling_runner(
        self, forward_pass: ForwardPass, batch: InputBatch, block_sizes: list[int | None]
    ) -> "PoolingRunner":
        # vLLM's poolers import many of its torch layers, which nothing else here needs.
        from vllm_metal_plugin.pooler import build_pooler
        from vllm_metal_plugin.pooling_runner import PoolingRunner

        return PoolingRunner(forward_pass, batch, build_pooler(self.vllm_config, self.model), block_sizes=block_sizes)

    def _forward_pass(self, kv_cache_config: "KVCacheConfig") -> ForwardPass:
        if self.config.envs.use_paged_attention:
            return PagedForward(self.model, KVCachePool(kv_cache.to_layout(kv_cache_config, self.specs)))
        tree: PrefixTree[Any] | None = None
        if self.prefix_bytes:
            tree = PrefixTree(self.prefix_bytes, needs_state=needs_state(self.model))
        return ContiguousForward(ContiguousModel(self.model, tree))

    def update_max_model_len(self, max_model_len: int) -> None:
        """Take the length that fits, which vLLM finds for ``--max-model-len auto``."""
        self.model_config.max_model_len = max_model_len

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Build the kernels of a decode step now and not in the first request."""
        start = time.perf_counter()
        memory.measure_step_bytes(self.model, self.specs, num_tokens=1, num_reqs=1, target=self.target)
        return CompilationTimes(language_model=time.perf_counter() - start, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Which routes the server opens."""
        return self.runner.supported_tasks

    def execute_model(self, scheduler_output: "SchedulerOutput") -> ModelRunnerOutput | None:
        """Start a step; see ``ModelRunner.execute_model``."""
        return self.runner.execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: "GrammarOutput | None") -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Sample the step that was started."""
        return self.runner.sample_tokens(grammar_output)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Return what the last step's tokens make one guess."""
        return self.runner.take_draft_token_ids() if isinstance(self.runner, ModelRunner) else None

    def execute_dummy_batch(self) -> None:
        """Data-parallel ranks compute nothing together."""

    def add_lora(self, lora_request: "LoRARequest") -> bool:
        """Load an adapter."""
        return self.adapters.add(lora_request)

    def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter."""
        return self.adapters.remove(lora_id)

    def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter loaded."""
        return self.adapters.pin(lora_id)

    def list_loras(self) -> set[int]:
        """Return the numbers of the adapters that are loaded."""
        return self.adapters.ids

    def synchronize_device(self) -> None:
        """Wait for everything dispatched."""
        self.runner.synchronize()

    def reset_mm_cache(self) -> None:
        """Processed inputs are kept in vLLM's own processes, not here."""

    def reset_encoder_cache(self) -> None:
        """Forget what encoders have made of inputs."""
        if self.multimodal is not None:
            self.multimodal.encoder_cache.reset()
