"""vLLM 0.32 cuts an image that must stay whole (``disable_chunked_mm_input``) where a step begins with or in it.

Its scheduler stops before such an image when a step has too few tokens left for it. The next step then begins with the
image, and takes whatever is left again, which may be a part; so it does after a prefix hit that ends in the image. Can
go when ``Scheduler._try_schedule_encoder_inputs`` compares with the image's end in these cases, too.
"""

from functools import wraps
from typing import Any

_installed = False


def install() -> None:
    """Let a request wait for a step that has room for the rest of its image; safe to repeat."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler._try_schedule_encoder_inputs  # noqa: SLF001

    @wraps(original)
    def try_schedule(self: Any, request: Any, computed: int, new: int, budget: int, *args: Any, **kwargs: Any) -> Any:
        config = self.scheduler_config
        if config.disable_chunked_mm_input and request.has_encoder_inputs:
            longest = config.long_prefill_token_threshold or config.max_num_batched_tokens
            for feature in request.mm_features:
                begin, end = feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length
                if begin <= computed and computed + new < end <= computed + longest:
                    return [], 0, budget, [], []
        return original(self, request, computed, new, budget, *args, **kwargs)

    Scheduler._try_schedule_encoder_inputs = try_schedule  # noqa: SLF001
