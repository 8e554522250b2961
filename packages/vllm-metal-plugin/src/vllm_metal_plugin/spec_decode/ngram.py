"""Drafts from the request's own tokens: what followed when its last few tokens occurred before."""

import numpy as np
from jaxtyping import Int32

from vllm_metal_plugin.spec_decode.proposer import Proposer


class NgramProposer(Proposer):
    """Prompt lookup, with vLLM's choice: the longest suffix that occurred before, and there its first occurrence.

    Args:
        min_tokens: Of a suffix that counts.
        max_tokens: Likewise.
    """

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        self._sizes = range(max_tokens, min_tokens - 1, -1)

    def propose(self, token_ids: Int32[np.ndarray, "tokens"], max_drafts: int) -> list[int]:
        """Return what followed the suffix; see :class:`Proposer`."""
        length = len(token_ids)
        for size in self._sizes:
            if size >= length or max_drafts <= 0:
                continue
            # ends[i]: whether the suffix also ends at token size - 1 + i.
            ends = token_ids[size - 1 : -1] == token_ids[-1]
            for back in range(1, size):
                ends &= token_ids[size - 1 - back : -1 - back] == token_ids[-1 - back]
            if ends.any():
                follow = int(ends.argmax()) + size
                drafts: list[int] = token_ids[follow : follow + max_drafts].tolist()
                return drafts
        return []
