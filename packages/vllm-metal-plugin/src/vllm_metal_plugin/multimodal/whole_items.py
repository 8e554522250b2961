"""Steps that hold an image or a video whole, for models in which its tokens see each other."""

from typing import TYPE_CHECKING

from vllm_metal_plugin.log import metal_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = metal_logger(__name__)


def keep_items_whole(vllm_config: "VllmConfig") -> None:
    """Let no step end in an image, and let a step be as long as the largest input: vLLM starts no engine otherwise."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import get_mm_max_toks_per_item

    scheduler = vllm_config.scheduler_config
    scheduler.disable_chunked_mm_input = True
    processor = MULTIMODAL_REGISTRY.create_processor(vllm_config.model_config)
    allowed = [modality for modality, count in processor.info.allowed_mm_limits.items() if count]
    tokens = get_mm_max_toks_per_item(processor, dict.fromkeys(allowed, 1), None)
    largest = max((tokens[modality] for modality in allowed if modality in tokens), default=0)
    if largest > scheduler.max_num_batched_tokens:
        logger.info(
            "Steps have up to %d tokens, not %d: all of the largest input has to be in one step. "
            "--limit-mm-per-prompt '{\"video\": 0}' allows shorter ones where that is a video.",
            largest,
            scheduler.max_num_batched_tokens,
        )
        scheduler.max_num_batched_tokens = largest
