"""A model over mlx-lm's own caches: one set for each request, batched for decoding, with a cache of prefixes."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32
from mlx_lm.models.cache import make_prompt_cache

from metal_kv import PrefixTree
from metal_models.decode_batch import DecodeBatch, batchable
from metal_models.errors import MetalModelsError
from metal_models.head_split import HeadSplit
from metal_models.model import PagedModel
from metal_models.request_caches import Caches, cuttable, restore, rows, snapshot, state_arrays

STATE_STRIDE = 256
"""A prompt leaves a state behind after the last multiple of so many tokens, for prompts that begin alike."""


@dataclass(frozen=True, eq=False)
class RequestRows:
    """The rows of one request in a step.

    Attributes:
        req_id: The request.
        begin: Position of its first row; 0 starts it anew.
        end: Position after its last row.
        token_ids: The tokens that are known of it, at least up to ``end`` while it is being prefilled.
        salt: Requests share prefixes under the same salt only; None shares nothing.
    """

    req_id: str
    begin: int
    end: int
    token_ids: Int32[np.ndarray, "tokens"]
    salt: str | None = ""


@dataclass
class _Request:
    caches: Caches | None
    length: int
    states: dict[int, tuple[Caches, int]]
    cut_at: set[int]
    kept: bool


class ContiguousModel:
    """Runs steps like a ``PagedModel``, with each request's keys and values in arrays of its own.

    Prompts are computed one request at a time; requests with one row are batched where mlx-lm can batch their
    caches. A prompt's rows that the prefix tree knows are not computed, and its own go there when it is complete.

    Args:
        model: The model; its paged cache is not used.
        prefix_tree: Where prompts are kept, made with ``needs_state`` as ``needs_state(model)`` says; None for
            nowhere.
    """

    def __init__(self, model: PagedModel, prefix_tree: PrefixTree[Caches] | None = None) -> None:
        self._model = model
        self._split = HeadSplit(model.module)
        self._tree = prefix_tree
        self._requests: dict[str, _Request] = {}
        self._batch = DecodeBatch()
        self._written: list[mx.array] = []

    @property
    def num_requests(self) -> int:
        """Requests whose caches are here."""
        return len(self._requests)

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop the caches of some requests."""
        self._batch.drop(req_ids)
        for req_id in req_ids:
            self._requests.pop(req_id, None)

    def forward(
        self, token_ids: Int32[mx.array, "tokens"], requests: Sequence[RequestRows]
    ) -> Float[mx.array, "tokens hidden"]:
        """Compute a step lazily; rows that a known prefix covers are zeros.

        Args:
            token_ids: Ids of all rows, request by request.
            requests: Whose rows they are.
        """
        self._written = []
        starts = np.cumsum([0, *(request.end - request.begin for request in requests)])
        decodes = [i for i, request in enumerate(requests) if self._decodes(request)]
        alone = [i for i in range(len(requests)) if i not in set(decodes)]
        if len(decodes) == 1:
            alone, decodes = sorted([*alone, *decodes]), []
        self._rearrange([requests[i].req_id for i in decodes])
        pieces: list[tuple[np.ndarray, mx.array]] = []
        if decodes:
            pieces.append(self._decode(token_ids, {requests[i].req_id: int(starts[i]) for i in decodes}))
        for i in alone:
            pieces += self._prefill(token_ids, requests[i], int(starts[i]))
        for i in decodes:
            self._requests[requests[i].req_id].length += 1
        return self._in_order(pieces, int(starts[-1]))

    def compute_logits(self, hidden: Float[mx.array, "rows hidden"]) -> Float[mx.array, "rows vocab"]:
        """Apply the model's own head to some hidden rows."""
        return self._model.compute_logits(hidden)

    def arrays(self) -> list[mx.array]:
        """Return what to evaluate together with the step's outputs."""
        return self._written

    def _decodes(self, request: RequestRows) -> bool:
        known = self._requests.get(request.req_id)
        if known is None or request.end - request.begin != 1 or request.begin != known.length or not known.length:
            return False
        return known.caches is None or batchable(known.caches)

    def _rearrange(self, decoding: list[str]) -> None:
        """Let the batch hold exactly the requests that decode together."""
        for req_id, caches in self._batch.release(set(self._batch.req_ids) - set(decoding)).items():
            self._requests[req_id].caches = caches
        joining = []
        for req_id in decoding:
            own = self._requests[req_id].caches
            if own is not None:
                joining.append((req_id, own))
                self._requests[req_id].caches = None
        self._batch.join(joining)

    def _decode(self, token_ids: mx.array, row_of: dict[str, int]) -> tuple[np.ndarray, mx.array]:
        step_rows = np.array([row_of[req_id] for req_id in self._batch.req_ids], np.int32)
        with self._model.lora.among(step_rows):
            hidden = self._split.hidden(token_ids[mx.array(step_rows)][:, None], list(self._batch.caches))
        self._written += state_arrays(self._batch.caches)
        return step_rows, hidden.squeeze(1)

    def _prefill(self, token_ids: mx.array, request: RequestRows, row: int) -> list[tuple[np.ndarray, mx.array]]:
        """Compute the rows of one request that its caches do not have yet."""
        own = self._open(request)
        if own.caches is None or own.length < request.begin:
            raise MetalModelsError(
                f"[contiguous forward] expected the caches of {request.req_id} to have {request.begin} tokens, got "
                f"{own.length}. Start a request at position 0, or go on where it stopped."
            )
        if own.length >= request.end:
            return []
        cuts = sorted({own.length, request.end, *(p for p in own.cut_at if own.length < p < request.end)})
        pieces = []
        for begin, end in pairwise(cuts):
            first = row + begin - request.begin
            step_rows = np.arange(first, first + end - begin, dtype=np.int32)
            with self._model.lora.among(step_rows):
                hidden = self._split.hidden(token_ids[first : first + end - begin][None], list(own.caches))
            pieces.append((step_rows, hidden.squeeze(0)))
            own.length = end
            if end in own.cut_at:
                own.states[end] = snapshot(own.caches)
        self._written += state_arrays(own.caches)
        self._keep(request, own)
        return pieces

    def _open(self, request: RequestRows) -> _Request:
        """Return what is known of a request; at position 0 that is the longest known prefix."""
        known = self._requests.get(request.req_id)
        if known is not None and request.begin:
            return known
        new = make_prompt_cache(self._model.module)
        own = _Request(new, 0, {}, set(), kept=self._tree is None or request.salt is None)
        if self._tree is not None and request.salt is not None:
            # The last token is always computed: its output is what the request is after.
            last = len(request.token_ids) - 1
            match = self._tree.match(request.token_ids[:last], salt=request.salt)
            if match.length:
                own.caches = restore(new, match.rows, match.length, match.state)
                own.length = match.length
            if self._tree.needs_state:
                own.cut_at = {match.known, last // STATE_STRIDE * STATE_STRIDE} - {0, own.length}
        self._requests[request.req_id] = own
        return own

    def _keep(self, request: RequestRows, own: _Request) -> None:
        """Put a complete prompt into the prefix tree."""
        if own.kept or own.length < len(request.token_ids) or self._tree is None or own.caches is None:
            return
        caches = own.caches
        states = own.states
        if self._tree.needs_state:
            states[own.length] = snapshot(caches)
        self._written += self._tree.insert(
            request.token_ids[: own.length],
            lambda begin, end: rows(caches, begin, end),
            states,
            salt=request.salt or "",
        )
        for copies, _ in states.values():
            self._written += state_arrays(copies)
        own.kept, own.states = True, {}

    def _in_order(self, pieces: list[tuple[np.ndarray, mx.array]], num_tokens: int) -> mx.array:
        computed = np.concatenate([step_rows for step_rows, _ in pieces]) if pieces else np.zeros(0, np.int32)
        parts = [hidden for _, hidden in pieces]
        if len(computed) < num_tokens:
            parts.append(mx.zeros((1, self._model.hidden_size), self._model.dtype))
        joined = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        if len(computed) == num_tokens and (np.diff(computed) == 1).all():
            return joined
        order = np.full(num_tokens, len(computed), np.int32)
        order[computed] = np.arange(len(computed), dtype=np.int32)
        return joined[mx.array(order)]


def needs_state(model: PagedModel) -> bool:
    """Tell whether prefixes of the model's caches need states: windows that rotate, recurrences."""
    caches: Iterable[object] = make_prompt_cache(model.module)
    return not all(cuttable(cache) for cache in caches)
