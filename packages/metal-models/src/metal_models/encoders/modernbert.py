"""ModernBERT: rotary positions, a norm before each residual, layers that see a window between ones that see all."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32
from mlx_lm.models.base import BaseModelArgs

from metal_models.encoders.names import Names
from metal_models.encoders.ragged import RaggedSequences

NAMES = Names(parts=("embeddings.", "layers.", "final_norm."), prefixes=("model.",))

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass
class ModelArgs(BaseModelArgs):
    """What ``config.json`` says, as old and new versions of transformers write it."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_activation: str = "gelu"
    local_attention: int = 128
    global_attn_every_n_layers: int = 3
    global_rope_theta: float = 160000.0
    local_rope_theta: float | None = 10000.0
    layer_types: list[str] | None = None
    rope_parameters: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        every = self.global_attn_every_n_layers
        self.layer_types = self.layer_types or [
            _SLIDING if index % every else _FULL for index in range(self.num_hidden_layers)
        ]
        if self.hidden_activation != "gelu":
            raise ValueError(f"hidden_activation {self.hidden_activation!r}")
        kinds = {self._rope(kind).get("rope_type", "default") for kind in (_FULL, _SLIDING)}
        if kinds != {"default"}:
            raise ValueError(f"rope_parameters of type {', '.join(sorted(kinds - {'default'}))}")

    def _rope(self, kind: str) -> dict[str, Any]:
        return (self.rope_parameters or {}).get(kind) or {}

    def theta(self, kind: str) -> float:
        """Base of the rotary embedding of layers of a kind."""
        otherwise = self.global_rope_theta if kind == _FULL else self.local_rope_theta or self.global_rope_theta
        return float(self._rope(kind).get("rope_theta", otherwise))

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that the model was made for."""
        return self.max_position_embeddings


def _norm(args: ModelArgs) -> nn.LayerNorm:
    return nn.LayerNorm(args.hidden_size, eps=args.norm_eps, bias=args.norm_bias)


class Embeddings(nn.Module):
    """A word's row, normalised."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.norm = _norm(args)

    def __call__(self, token_ids: mx.array) -> mx.array:
        """Return the rows of tokens."""
        rows: mx.array = self.norm(self.tok_embeddings(token_ids))
        return rows


class Attention(nn.Module):
    """Attention to all of the sequence, or to a window around each token."""

    def __init__(self, args: ModelArgs, kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.Wqkv = nn.Linear(args.hidden_size, 3 * args.hidden_size, bias=args.attention_bias)
        self.Wo = nn.Linear(args.hidden_size, args.hidden_size, bias=args.attention_bias)
        self._heads = args.num_attention_heads
        self._head_size = args.hidden_size // args.num_attention_heads
        self._theta = args.theta(kind)
        self._window = args.local_attention // 2 if kind == _SLIDING else None

    def __call__(self, rows: mx.array, sequences: RaggedSequences) -> mx.array:
        """Attend within each sequence."""
        projected = self.Wqkv(rows).reshape(rows.shape[0], 3, self._heads, self._head_size)
        query, key, value = (projected[:, part] for part in range(3))
        out = sequences.attend(
            self._rotated(query, sequences.positions),
            self._rotated(key, sequences.positions),
            value,
            scale=self._head_size**-0.5,
            window=self._window,
        )
        projected_out: mx.array = self.Wo(out.reshape(rows.shape))
        return projected_out

    def _rotated(self, heads: mx.array, positions: mx.array) -> mx.array:
        """Rotate ``[tokens, heads, head_size]``, each token by its own position."""
        return mx.fast.rope(
            heads[:, :, None],
            self._head_size,
            traditional=False,
            base=self._theta,
            scale=1.0,
            offset=positions,
        ).squeeze(2)


class MLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.Wi = nn.Linear(args.hidden_size, 2 * args.intermediate_size, bias=args.mlp_bias)
        self.Wo = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, rows: mx.array) -> mx.array:
        """Widen the rows, gate them, narrow them."""
        values, gate = mx.split(self.Wi(rows), 2, axis=-1)
        out: mx.array = self.Wo(nn.gelu(values) * gate)
        return out


class Layer(nn.Module):
    """Attention, then the feed-forward layer; the first has no norm before attention."""

    def __init__(self, args: ModelArgs, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        layer_types = args.layer_types or []
        self.attn_norm = _norm(args) if index else nn.Identity()
        self.attn = Attention(args, layer_types[index])
        self.mlp_norm = _norm(args)
        self.mlp = MLP(args)

    def __call__(self, rows: mx.array, sequences: RaggedSequences) -> mx.array:
        """Return the rows after this layer."""
        rows = rows + self.attn(self.attn_norm(rows), sequences)
        out: mx.array = rows + self.mlp(self.mlp_norm(rows))
        return out


class Model(nn.Module):
    """Token ids in, hidden rows out."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.args = args
        self.embeddings = Embeddings(args)
        self.layers = [Layer(args, index) for index in range(args.num_hidden_layers)]
        self.final_norm = _norm(args)

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
            token_types: Not used: there are no segments.
        """
        rows = self.embeddings(token_ids)
        for layer in self.layers:
            rows = layer(rows, sequences)
        out: mx.array = self.final_norm(rows)
        return out
