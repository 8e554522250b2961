"""What the tensors of a checkpoint are: of the encoder, of a head on top of it, or of no use here."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

Tensors = dict[str, mx.array]

# Heads that the poolers of a server apply; those that predict tokens have no use.
_HEADS = ("classifier.", "pooler.", "head.", "score.", "sparse_linear.", "colbert_linear.")
_DROPPED = ("lm_head.", "cls.", "decoder.")


@dataclass(frozen=True)
class Names:
    """A family's names.

    Attributes:
        parts: How names of the encoder's own tensors begin.
        prefixes: What may stand before them, depending on what the encoder was saved with.
        renamed: Endings that older checkpoints have, and what they are now.
        unused: Endings of tensors that hold nothing.
    """

    parts: tuple[str, ...]
    prefixes: tuple[str, ...]
    renamed: Sequence[tuple[str, str]] = ()
    unused: tuple[str, ...] = ()

    def divide(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """Return the encoder's tensors and those of heads, with the encoder's prefix removed from both.

        A tensor of neither is with the encoder's under the name that it has, where a strict load finds it.
        """
        encoder: Tensors = {}
        heads: Tensors = {}
        for full_name, array in tensors.items():
            name = next((full_name.removeprefix(p) for p in self.prefixes if full_name.startswith(p)), full_name)
            for old, new in self.renamed:
                if name.endswith(old):
                    name = name.removesuffix(old) + new
            if name.endswith(self.unused) or (name.startswith(_DROPPED) and not name.startswith(self.parts)):
                continue
            (heads if name.startswith(_HEADS) else encoder)[name] = array
        return encoder, heads
