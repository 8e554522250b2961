"""vLLM 0.32 sends the worker no data of images that cached prefixes cover when their request starts.

When such a request is preempted and its prefix has been evicted before it resumes, the scheduler plans the encoder
run that was not needed before, and the worker, which gets a request's data once, has nothing to run it on. With one
worker in the scheduler's process, data costs nothing to send. Can go when resumed requests bring their data again.
"""

from collections.abc import Sequence
from typing import Any


def install() -> None:
    """Let new requests keep the data of all their items; safe to repeat."""
    from vllm.v1.core.sched import output

    output.strip_covered_mm_data = _keep


def _keep(mm_features: Sequence[Any], *args: Any, **kwargs: Any) -> Sequence[Any]:
    return mm_features
