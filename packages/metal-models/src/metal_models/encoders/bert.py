"""BERT, RoBERTa and XLM-RoBERTa: learned positions, a norm after each residual."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32
from mlx_lm.models.base import BaseModelArgs

from metal_models.encoders.names import Names
from metal_models.encoders.ragged import RaggedSequences

NAMES = Names(
    parts=("embeddings.", "encoder."),
    prefixes=("bert.", "roberta.", "model."),
    renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
    unused=("embeddings.position_ids", "embeddings.token_type_ids"),
)

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_fast": nn.gelu_approx,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}


@dataclass
class ModelArgs(BaseModelArgs):
    """What ``config.json`` says."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int = 1
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        if self.position_embedding_type not in ("absolute", None):
            raise ValueError(f"position_embedding_type {self.position_embedding_type!r}")
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r}")

    @property
    def first_position(self) -> int:
        """Row of the table of positions that a first token has: RoBERTa's begin after that of padding."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that has positions."""
        return self.max_position_embeddings - self.first_position


class Embeddings(nn.Module):
    """The sum of a word's, a position's and a segment's row, normalised."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.position_embeddings = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        self.token_type_embeddings = nn.Embedding(args.type_vocab_size, args.hidden_size)
        self.LayerNorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)
        self._first_position = args.first_position

    def __call__(self, token_ids: mx.array, positions: mx.array, token_types: mx.array | None) -> mx.array:
        """Return the rows of tokens at ``positions``."""
        types = mx.zeros((1,), mx.int32) if token_types is None else token_types
        rows = self.word_embeddings(token_ids) + self.token_type_embeddings(types)
        normalised: mx.array = self.LayerNorm(rows + self.position_embeddings(positions + self._first_position))
        return normalised


class SelfAttention(nn.Module):
    """The three projections of attention, and attention."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.query = nn.Linear(args.hidden_size, args.hidden_size)
        self.key = nn.Linear(args.hidden_size, args.hidden_size)
        self.value = nn.Linear(args.hidden_size, args.hidden_size)
        self._heads = args.num_attention_heads
        self._head_size = args.hidden_size // args.num_attention_heads

    def __call__(self, rows: mx.array, sequences: RaggedSequences) -> mx.array:
        """Attend within each sequence."""
        heads = (rows.shape[0], self._heads, self._head_size)
        query, key, value = (layer(rows).reshape(heads) for layer in (self.query, self.key, self.value))
        out = sequences.attend(query, key, value, scale=self._head_size**-0.5)
        return out.reshape(rows.shape)


class Output(nn.Module):
    """A projection onto the residual, and the norm of their sum."""

    def __init__(self, inputs: int, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense = nn.Linear(inputs, args.hidden_size)
        self.LayerNorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, rows: mx.array, residual: mx.array) -> mx.array:
        """Project ``rows`` onto ``residual``."""
        normalised: mx.array = self.LayerNorm(self.dense(rows) + residual)
        return normalised


class Attention(nn.Module):
    """Attention and its residual, under the names that checkpoints have for them."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self["self"] = SelfAttention(args)
        self.output = Output(args.hidden_size, args)

    def __call__(self, rows: mx.array, sequences: RaggedSequences) -> mx.array:
        """Attend, and add the rows themselves."""
        out: mx.array = self.output(self["self"](rows, sequences), rows)
        return out


class Intermediate(nn.Module):
    """The first half of the feed-forward layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense = nn.Linear(args.hidden_size, args.intermediate_size)
        self._activation = _ACTIVATIONS[args.hidden_act]

    def __call__(self, rows: mx.array) -> mx.array:
        """Widen the rows."""
        return self._activation(self.dense(rows))


class Layer(nn.Module):
    """Attention, then the feed-forward layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attention = Attention(args)
        self.intermediate = Intermediate(args)
        self.output = Output(args.intermediate_size, args)

    def __call__(self, rows: mx.array, sequences: RaggedSequences) -> mx.array:
        """Return the rows after this layer."""
        attended = self.attention(rows, sequences)
        out: mx.array = self.output(self.intermediate(attended), attended)
        return out


class Encoder(nn.Module):
    """The layers."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = [Layer(args) for _ in range(args.num_hidden_layers)]

    def __call__(self, rows: mx.array, sequences: RaggedSequences) -> mx.array:
        """Return the rows after the last layer."""
        for layer in self.layer:
            rows = layer(rows, sequences)
        return rows


class Model(nn.Module):
    """Token ids in, hidden rows out."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.args = args
        self.embeddings = Embeddings(args)
        self.encoder = Encoder(args)

    def __call__(
        self,
        token_ids: Int32[mx.array, "tokens"],
        sequences: RaggedSequences,
        token_types: Int32[mx.array, "tokens"] | None = None,
    ) -> Float[mx.array, "tokens hidden"]:
        """Return the last layer's rows.

        Args:
            token_ids: Of all sequences, one after the other.
            sequences: Which rows are whose.
            token_types: Segment of each token; None for 0.
        """
        types = token_types if self.args.type_vocab_size > 1 else None
        out: mx.array = self.encoder(self.embeddings(token_ids, sequences.positions, types), sequences)
        return out
