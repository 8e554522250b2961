"""vLLM 0.32 has no way for a worker to say "this step failed": any exception in a step ends the engine.

The runner returns a ``FailedStepOutput`` instead of raising. The scheduler finishes the requests it names with status
FINISHED_ERROR (the clients get HTTP 500) and drops their blocks from the prefix cache, since the step that should have
filled them did not run. Of errors of requests to be pooled the front end knows one, a missing multi-modal input: the
scheduler's output carries that with a mark of ours, and the front end replaces it. All of it can go when
``ModelRunnerOutput`` can carry errors per request.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput

_installed = False
_installed_in_front_end = False
_MARK = ["failed step"]
"""In place of the hashes of inputs that are missing."""


@dataclass
class FailedStepOutput(ModelRunnerOutput):  # type: ignore[misc]
    """The output of a step that raised: no tokens, and who must be told."""

    failed_req_ids: set[str] = field(default_factory=set)

    @classmethod
    def for_requests(cls, req_ids: Iterable[str]) -> "FailedStepOutput":
        """An output that fails ``req_ids``."""
        ids = list(req_ids)
        return cls(
            req_ids=ids,
            req_id_to_index={req_id: row for row, req_id in enumerate(ids)},
            sampled_token_ids=[[] for _ in ids],
            failed_req_ids=set(ids),
        )

    @classmethod
    def of_some(cls, output: ModelRunnerOutput, req_ids: Iterable[str]) -> "FailedStepOutput":
        """Return ``output`` as one that fails ``req_ids`` and is good for the other requests."""
        failed = set(req_ids)
        values = {part.name: getattr(output, part.name) for part in fields(ModelRunnerOutput)}
        sampled = zip(output.req_ids, output.sampled_token_ids, strict=True)
        values["sampled_token_ids"] = [[] if req_id in failed else tokens for req_id, tokens in sampled]
        return cls(**values, failed_req_ids=failed)


def install() -> None:
    """Teach the scheduler to read ``FailedStepOutput``."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.update_from_output

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        if not isinstance(model_runner_output, FailedStepOutput):
            return original(self, scheduler_output, model_runner_output)
        pooling = {req_id for req_id, request in self.requests.items() if request.pooling_params is not None}
        _fail(self, model_runner_output.failed_req_ids)
        outputs = original(self, scheduler_output, model_runner_output)
        _mark(outputs, pooling)
        return outputs

    Scheduler.update_from_output = update_from_output


def install_in_front_end() -> None:
    """Tell clients of pooling requests that a step failed; safe to repeat."""
    global _installed_in_front_end
    if _installed_in_front_end:
        return
    _installed_in_front_end = True
    from vllm.outputs import RequestError
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    process_outputs, make_request_output = OutputProcessor.process_outputs, RequestState.make_request_output

    def process(self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            if output.mm_cache_miss_hashes == _MARK and output.request_id in self.request_states:
                self.request_states[output.request_id].step_failed = True
        return process_outputs(self, engine_core_outputs, *args, **kwargs)

    def make(self: Any, *args: Any, error: Any = None, **kwargs: Any) -> Any:
        if error is not None and getattr(self, "step_failed", False):
            text = "The step that computed this request failed; the server's log says why."
            error = RequestError(code="step_failed", message=text)
        return make_request_output(self, *args, error=error, **kwargs)

    OutputProcessor.process_outputs, RequestState.make_request_output = process, make


def _fail(scheduler: Any, failed: set[str]) -> None:
    """Forget the cached blocks of ``failed`` and have the scheduler finish these requests with an error.

    Requests that took such a block over as a shared prefix since then are failed too: they would read it.
    """
    blocks = {req_id: _blocks(scheduler, req_id) for req_id in scheduler.requests}
    tainted = set[int]().union(*(blocks[req_id] for req_id in failed if req_id in blocks))
    sharing = {req_id for req_id, ids in blocks.items() if not tainted.isdisjoint(ids)}
    scheduler.kv_cache_manager.evict_blocks(tainted)
    # The scheduler finishes the requests in this set with an error at the end of every update.
    scheduler.encoder_cache_mismatch_reqs.update((failed | sharing) & scheduler.requests.keys())


def _mark(outputs: Any, pooling: set[str]) -> None:
    """Let the front end see that requests to be pooled failed.

    It takes their outputs for text otherwise.
    """
    for client in outputs.values():
        for output in client.outputs:
            if output.request_id in pooling and output.finish_reason is not None and output.pooling_output is None:
                output.mm_cache_miss_hashes = _MARK


def _blocks(scheduler: Any, req_id: str) -> set[int]:
    null_block = 0
    groups = scheduler.kv_cache_manager.get_block_ids(req_id)
    return {block for group in groups for block in group} - {null_block}
