"""How many bytes the encoders of a model need for the largest input that vLLM may send them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metal_models.multimodal import MultimodalItem, Towers
from vllm_metal_plugin.log import metal_logger
from vllm_metal_plugin.multimodal.items import placed_item

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = metal_logger(__name__)

SMALL_IMAGE_SIDE = 448
"""Of the image that is measured, and scaled up, where the largest one takes minutes or more memory than there is."""


@dataclass(frozen=True)
class EncoderMemory:
    """What encoders need beside their weights.

    Attributes:
        run_bytes: The peak of one run on the largest input.
        cache_bytes: All outputs that the scheduler keeps at a time.
    """

    run_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.run_bytes + self.cache_bytes


def measure_encoder(towers: Towers, vllm_config: "VllmConfig", *, on_cpu: bool) -> EncoderMemory:
    """Encode the largest input that the limits allow and return what that needed, and what the outputs may need.

    ``--skip-mm-profiling`` leaves the run out of the plan. Where the largest input cannot be encoded, what a small one
    needs is planned with.

    Args:
        towers: The model's.
        vllm_config: Says what processors and limits there are.
        on_cpu: Whether to encode a small image and scale up.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
    largest = {name: tokens for name, tokens in budget.mm_max_toks_per_item.items() if name in towers.modalities}
    if not largest:
        return EncoderMemory(0, 0)
    skipped = vllm_config.model_config.get_multimodal_config().skip_mm_profiling
    run_bytes, row_bytes = _measure(towers, budget.processor, vllm_config, largest, small=on_cpu or skipped)
    memory = EncoderMemory(0 if skipped else run_bytes, budget.encoder_cache_size * row_bytes)
    logger.info(
        "Encoders for %s: %.2f GB of weights, %.2f GB for an input of %d tokens, %.2f GB for %d cached ones",
        ", ".join(sorted(largest)),
        towers.nbytes / 1e9,
        memory.run_bytes / 1e9,
        max(largest.values()),
        memory.cache_bytes / 1e9,
        budget.encoder_cache_size,
    )
    return memory


def _measure(
    towers: Towers, processor: Any, vllm_config: "VllmConfig", largest: Mapping[str, int], *, small: bool
) -> tuple[int, int]:
    """Return the peak of encoding the largest input, or that of a small image scaled up, and the bytes of a token.

    Args:
        towers: The model's.
        processor: vLLM's.
        vllm_config: Says what limits there are.
        largest: Tokens of the largest input of each kind.
        small: Whether a small image will do.
    """
    modality = max(largest, key=lambda name: largest[name])
    if small and "image" in largest:
        item = _dummy_item(processor, vllm_config, "image", small=True)
        run_bytes, row_bytes = _encode(towers, item)
        return int(run_bytes * max(1.0, largest[modality] / max(1, item.num_embeds))), row_bytes
    try:
        return _encode(towers, _dummy_item(processor, vllm_config, modality, small=False))
    except RuntimeError as error:
        if "image" not in largest:
            raise
        logger.warning(
            "The largest %s, of %d tokens, cannot be encoded here (%s): requests with one will end with an error. "
            "Smaller limits (--mm-processor-kwargs, --limit-mm-per-prompt) refuse or shrink it.",
            modality,
            largest[modality],
            error,
        )
        return _measure(towers, processor, vllm_config, {"image": 0}, small=True)


def _dummy_item(processor: Any, vllm_config: "VllmConfig", modality: str, *, small: bool) -> MultimodalItem:
    """Return an input as vLLM makes them up to be as large as possible, or a small image."""
    from vllm.config.multimodal import ImageDummyOptions
    from vllm.multimodal.processing import TimingContext

    model = vllm_config.model_config
    options = dict(model.get_multimodal_config().limit_per_prompt)
    if small:
        side = SMALL_IMAGE_SIDE
        options[modality] = ImageDummyOptions(count=1, width=side, height=side)
    inputs = processor.get_dummy_inputs(seq_len=model.max_model_len, mm_counts={modality: 1}, mm_options=options)
    made = processor.apply(inputs, timing_ctx=TimingContext(enabled=False))
    return placed_item(modality, made["mm_placeholders"][modality][0], made["mm_kwargs"][modality][0])


def _encode(towers: Towers, item: MultimodalItem) -> tuple[int, int]:
    """Return the peak of a run, and the bytes of one row of its output."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    output = towers.encode(item)
    mx.eval(output)
    run_bytes = max(0, mx.get_peak_memory() - before)
    row_bytes = output.shape[1] * output.dtype.size
    del output
    mx.clear_cache()
    return run_bytes, row_bytes
