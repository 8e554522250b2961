"""A forward pass in which tokens stand for parts of images, video and sound."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_models.multimodal import RowEmbeddings, Towers
from vllm_metal_plugin.forward_pass import ForwardPass
from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.log import metal_logger
from vllm_metal_plugin.multimodal.encoder_cache import EncoderCache
from vllm_metal_plugin.multimodal.prompt_items import PromptItems
from vllm_metal_plugin.step_inputs import StepInputs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = metal_logger(__name__)


class MultimodalForward(ForwardPass):
    """Runs the encoders for what a step needs, and gives the rows of placeholders their output.

    A step without such rows is the wrapped forward pass's own; after an image with positions in time and space, its
    tokens are turned by other positions, nothing else.

    Args:
        forward_pass: The language model and its cache.
        towers: The model's encoders.
    """

    def __init__(self, forward_pass: ForwardPass, towers: Towers) -> None:
        self._forward_pass = forward_pass
        self._towers = towers
        self.encoder_cache = EncoderCache(towers.encode)
        self._prompts: dict[str, PromptItems] = {}
        self._failed: set[str] = set()

    def begin(self, scheduler_output: "SchedulerOutput") -> None:
        """Forget requests and encoder outputs that are not needed any more, and remember new prompts."""
        self._forward_pass.begin(scheduler_output)
        self.encoder_cache.forget(scheduler_output.free_encoder_mm_hashes)
        self._failed -= scheduler_output.finished_req_ids
        for req_id in scheduler_output.finished_req_ids:
            self._prompts.pop(req_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            self._prompts.pop(new.req_id, None)
            if new.mm_features:
                self._prompts[new.req_id] = PromptItems(new.prompt_token_ids or (), new.mm_features, self._towers)

    def forward(self, inputs: StepInputs, batch: InputBatch) -> Float[mx.array, "tokens hidden"]:
        """Return the step's hidden rows; see ``failed_requests``."""
        if any(req_id in self._prompts for req_id in inputs.req_ids):
            inputs = self._with_items(inputs)
        return self._forward_pass.forward(inputs, batch)

    def compute_logits(self, hidden: Float[mx.array, "rows hidden"]) -> Float[mx.array, "rows vocab"]:
        """Apply the model's head."""
        return self._forward_pass.compute_logits(hidden)

    def arrays(self) -> list[mx.array]:
        """Return what to evaluate with the step."""
        return self._forward_pass.arrays()

    def failed_requests(self) -> frozenset[str]:
        """Requests with an input that could not be encoded."""
        return frozenset(self._failed)

    def _with_items(self, inputs: StepInputs) -> StepInputs:
        rows = _StepRows(inputs)
        for i, req_id in enumerate(inputs.req_ids):
            prompt = self._prompts.get(req_id)
            if prompt is None or req_id in self._failed:
                continue
            try:
                self._add(rows, i, prompt)
            except Exception:
                logger.exception("An input of request %s could not be encoded; it ends with an error", req_id)
                self._failed.add(req_id)
        return rows.apply_to(inputs)

    def _add(self, rows: "_StepRows", i: int, prompt: PromptItems) -> None:
        """Add what the rows of the step's i-th request take."""
        begin, end = rows.span(i)
        for piece in prompt.slices(begin, end):
            output = self.encoder_cache.embeddings(piece.identifier, lambda n=piece.item: prompt.item(n))  # type: ignore[misc]
            rows.embed(i, piece.positions, output[piece.first : piece.first + len(piece.positions)])
        if prompt.rope is not None:
            rows.turn(i, prompt.rope.between(begin, end))
        for first, last in prompt.spans(begin, end):
            rows.see(i, first, last)


@dataclass
class _StepRows:
    """What the rows of a step take in place of their tokens' embeddings and positions."""

    inputs: StepInputs
    embedded: list[Int32[np.ndarray, "rows"]] = field(default_factory=list)
    values: list[mx.array] = field(default_factory=list)
    bidirectional: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        starts = self.inputs.query_start_loc
        self._begins = self.inputs.seq_lens - np.diff(starts)
        positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(self._begins - starts[:-1], np.diff(starts))
        self._plain = positions.astype(np.int32)
        self._turned = np.repeat(self._plain[None], 3, axis=0)

    def span(self, i: int) -> tuple[int, int]:
        """Return the positions that the rows of the i-th request are at, as begin and end."""
        return int(self._begins[i]), int(self.inputs.seq_lens[i])

    def embed(self, i: int, positions: Int32[np.ndarray, "rows"], values: mx.array) -> None:
        """Let the rows at some positions of the i-th request take ``values``."""
        self.embedded.append(positions - self._begins[i] + self.inputs.query_start_loc[i])
        self.values.append(values)

    def turn(self, i: int, coordinates: Int32[np.ndarray, "3 rows"]) -> None:
        """Place the rows of the i-th request in time, height and width."""
        self._turned[:, self.inputs.query_start_loc[i] : self.inputs.query_start_loc[i + 1]] = coordinates

    def see(self, i: int, first: int, last: int) -> None:
        """Let the rows from one position of the i-th request up to another see each other."""
        shift = int(self.inputs.query_start_loc[i] - self._begins[i])
        self.bidirectional.append((first + shift, last + shift))

    def apply_to(self, inputs: StepInputs) -> StepInputs:
        """Return the step with all that."""
        flat = bool((self._turned == self._turned[0]).all())
        if flat and (self._turned[0] != self._plain).any():
            inputs = replace(inputs, metadata=[group.at(self._turned[0]) for group in inputs.metadata])
        return replace(
            inputs,
            embeddings=_joined(self.embedded, self.values),
            rope_positions=None if flat else mx.array(self._turned),
            bidirectional=self.bidirectional,
        )


def _joined(rows: Sequence[np.ndarray], values: Sequence[mx.array]) -> RowEmbeddings | None:
    if not rows:
        return None
    return RowEmbeddings(np.concatenate(rows).astype(np.int32), mx.concatenate(list(values)))
