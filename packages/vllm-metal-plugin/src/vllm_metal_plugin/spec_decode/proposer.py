"""Where drafts come from: a method of ``--speculative-config`` is a file here and a line in ``PROPOSERS``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig


class Proposer(ABC):
    """Guesses how a request goes on."""

    @abstractmethod
    def propose(self, token_ids: Int32[np.ndarray, "tokens"], max_drafts: int) -> list[int]:
        """Return the next tokens, ``max_drafts`` at most, or nothing.

        Args:
            token_ids: Prompt and output so far.
            max_drafts: As many as may follow.
        """


def _ngram(config: "SpeculativeConfig") -> Proposer:
    from vllm_metal_plugin.spec_decode.ngram import NgramProposer

    return NgramProposer(config.prompt_lookup_min or 1, config.prompt_lookup_max or 1)


PROPOSERS: Mapping[str, Callable[["SpeculativeConfig"], Proposer]] = {"ngram": _ngram}
"""By vLLM's names of methods."""
