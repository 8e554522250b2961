"""What the towers made of inputs, by the identifier that vLLM gives an input."""

from collections.abc import Callable, Iterable

import mlx.core as mx
from jaxtyping import Float

from metal_models.multimodal import MultimodalItem

Encode = Callable[[MultimodalItem], mx.array]


class EncoderCache:
    """Outputs of an encoder until the scheduler says that they are not needed.

    The scheduler keeps count of the memory: it plans an encoder run for every output that it does not know to be here,
    and names those to forget. An output that is missing all the same (its run failed, or everything was forgotten) is
    computed when it is asked for.

    Attributes:
        encode: Returns an item's embeddings, lazily.
    """

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self._outputs: dict[str, mx.array] = {}

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._outputs

    @property
    def nbytes(self) -> int:
        """Size of all outputs."""
        return sum(output.nbytes for output in self._outputs.values())

    def embeddings(
        self, identifier: str, make_item: Callable[[], MultimodalItem]
    ) -> Float[mx.array, "embeddings width"]:
        """Return the output for an input, computed now if it is not here.

        It is waited for: an encoder that fails, or whose input is too large, then fails for this input alone.

        Args:
            identifier: vLLM's name of the input's content.
            make_item: Returns the input.
        """
        if identifier not in self._outputs:
            output = self.encode(make_item())
            mx.eval(output)
            self._outputs[identifier] = output
        return self._outputs[identifier]

    def forget(self, identifiers: Iterable[str]) -> None:
        """Drop some outputs."""
        for identifier in identifiers:
            self._outputs.pop(identifier, None)

    def reset(self) -> None:
        """Drop all outputs."""
        self._outputs.clear()
