"""What one layer keeps per block of tokens: shape, dtype and bytes of a page."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from metal_kernels import RowFormat
from metal_kv.errors import SpecError


def _require_positive(operation: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise SpecError(f"[{operation}] expected {name} >= 1, got {size}. Check the model's configuration.")


@dataclass(frozen=True)
class KVCacheSpec(ABC):
    """What every cache spec has: pages of ``block_size`` tokens.

    A *page* is what one layer stores for one block; pages of a layer lie one after another.
    """

    block_size: int

    def __post_init__(self) -> None:
        _require_positive(type(self).__name__, block_size=self.block_size)

    @property
    @abstractmethod
    def page_shape(self) -> tuple[int, ...]:
        """Shape of one page, in elements of ``page_dtype``."""

    @property
    @abstractmethod
    def page_dtype(self) -> mx.Dtype:
        """Element type of the page array."""

    @property
    def page_size_bytes(self) -> int:
        """Bytes one block takes in one layer."""
        return math.prod(self.page_shape) * self.page_dtype.size

    def max_blocks_per_request(self, num_tokens: int, max_in_flight_tokens: int = 0) -> int:
        """Blocks that one request of ``num_tokens`` holds at its fullest.

        Args:
            num_tokens: Context length.
            max_in_flight_tokens: Most tokens that can be scheduled before old blocks are given back;
                only caches that forget (sliding windows) depend on it.
        """
        del max_in_flight_tokens
        return math.ceil(num_tokens / self.block_size)


@dataclass(frozen=True)
class AttentionSpec(KVCacheSpec):
    """Keys and values of an attention layer: pages of ``[2, block_size, num_kv_heads, head_size]``.

    Index 0 of a page holds the keys, index 1 the values; both therefore have the same head size. With ``rows`` a page
    is ``[block_size, words]`` instead: quantised rows, each a token's keys and values with their scales.
    """

    num_kv_heads: int
    head_size: int
    head_size_v: int | None = None
    dtype: mx.Dtype = field(kw_only=True)
    rows: RowFormat | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(type(self).__name__, num_kv_heads=self.num_kv_heads, head_size=self.head_size)
        if self.head_size_v not in (None, self.head_size):
            raise SpecError(
                f"[{type(self).__name__}] expected head_size_v equal to head_size, got "
                f"head_size={self.head_size} and head_size_v={self.head_size_v}. "
                "Pages hold keys and values of one size; "
                "a model whose values are narrower must pad them to the head size of its keys."
            )
        object.__setattr__(self, "head_size_v", self.head_size)
        if self.rows and (self.rows.num_kv_heads, self.rows.head_size) != (self.num_kv_heads, self.head_size):
            raise SpecError(
                f"[{type(self).__name__}] expected rows of {self.num_kv_heads} heads of {self.head_size}, got "
                f"{self.rows}. Make the row format from the layer's own sizes."
            )

    @property
    def page_shape(self) -> tuple[int, ...]:
        """``(2, block_size, num_kv_heads, head_size)``, or ``(block_size, words)`` of quantised rows."""
        if self.rows:
            return (self.block_size, self.rows.row_words)
        return (2, self.block_size, self.num_kv_heads, self.head_size)

    @property
    def page_dtype(self) -> mx.Dtype:
        """Element type of keys and values, or the words of quantised rows."""
        return mx.uint32 if self.rows else self.dtype

    @property
    def window(self) -> int | None:
        """Positions a query sees, itself included; None for all."""
        return None


@dataclass(frozen=True)
class FullAttentionSpec(AttentionSpec):
    """Keys and values of a layer that sees its whole context."""


@dataclass(frozen=True)
class SlidingWindowSpec(AttentionSpec):
    """Keys and values of a layer that sees the last ``sliding_window`` positions, its own included."""

    sliding_window: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(type(self).__name__, sliding_window=self.sliding_window)

    @property
    def window(self) -> int | None:
        """Positions a query sees, itself included."""
        return self.sliding_window

    def max_blocks_per_request(self, num_tokens: int, max_in_flight_tokens: int = 0) -> int:
        """Blocks of the window and the tokens in flight, plus one: a window seldom starts on a block."""
        live_tokens = min(self.sliding_window - 1 + max_in_flight_tokens, num_tokens)
        return math.ceil(live_tokens / self.block_size) + 1


@dataclass(frozen=True)
class LatentSpec(KVCacheSpec):
    """Latent rows of multi-head latent attention: pages of ``[block_size, latent_size + rope_size]``.

    A row is the compressed latent followed by the rotary part of the key, shared by all heads.
    See DeepSeek-V2, https://arxiv.org/abs/2405.04434.
    """

    latent_size: int
    rope_size: int
    dtype: mx.Dtype = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("LatentSpec", latent_size=self.latent_size, rope_size=self.rope_size + 1)

    @property
    def page_shape(self) -> tuple[int, ...]:
        """``(block_size, latent_size + rope_size)``."""
        return (self.block_size, self.latent_size + self.rope_size)

    @property
    def page_dtype(self) -> mx.Dtype:
        """Element type of the rows."""
        return self.dtype


@dataclass(frozen=True)
class RecurrentStateSpec(KVCacheSpec):
    """The state of a recurrent layer after the last token of a block: one state per page.

    The arrays of a state lie one after another in a page, in the order of ``shapes``; a page is an array of
    the widest unsigned words (4, 2 or 1 bytes) that every array of the state fills exactly. The page may be
    padded with ``page_size_padded`` to the bytes of the attention page it shares a slab with. A request holds
    ``blocks_per_request`` states at once: 1, 2 where the state at the end of the last full block is kept for requests
    with the same prefix, or 3 where a step may leave that one and another at its end.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]
    page_size_padded: int | None = None
    blocks_per_request: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shapes or len(self.shapes) != len(self.dtypes):
            raise SpecError(
                f"[RecurrentStateSpec] expected one dtype for each of at least one shape, got "
                f"{len(self.shapes)} shapes and {len(self.dtypes)} dtypes. "
                "Name every array of the layer's state."
            )
        for shape in self.shapes:
            _require_positive("RecurrentStateSpec", size=math.prod(shape))
        content_bytes = sum(self.state_bytes)
        if self.page_size_padded is not None and self.page_size_padded < content_bytes:
            raise SpecError(
                f"[RecurrentStateSpec] expected page_size_padded >= {content_bytes} (the state's bytes), "
                f"got {self.page_size_padded}. Use larger attention blocks or no padding."
            )

    @property
    def state_bytes(self) -> tuple[int, ...]:
        """Bytes of each array of the state."""
        return tuple(math.prod(shape) * dtype.size for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    @property
    def page_size_bytes(self) -> int:
        """Bytes of the state, or the padded page."""
        return self.page_size_padded or sum(self.state_bytes)

    @property
    def page_dtype(self) -> mx.Dtype:
        """Widest unsigned word that fits every part of the page."""
        unit = math.gcd(self.page_size_bytes, *self.state_bytes)
        return {0: mx.uint32, 2: mx.uint16}.get(unit % 4, mx.uint8)

    @property
    def page_shape(self) -> tuple[int, ...]:
        """``(words,)``."""
        return (self.page_size_bytes // self.page_dtype.size,)

    def max_blocks_per_request(self, num_tokens: int, max_in_flight_tokens: int = 0) -> int:
        """Return ``blocks_per_request``: a request carries only its latest state."""
        del num_tokens, max_in_flight_tokens
        return self.blocks_per_request

    def unpack(self, pages: mx.array) -> tuple[mx.array, ...]:
        """Return the arrays of the states in ``pages``.

        Args:
            pages: ``[blocks, words]`` rows of the layer's page array.

        Returns:
            One array ``[blocks, *shape]`` per entry of ``shapes``; lazy copies, not views of the pool.
        """
        states, start = [], 0
        for shape, dtype, nbytes in zip(self.shapes, self.dtypes, self.state_bytes, strict=True):
            words = nbytes // self.page_dtype.size
            part = mx.contiguous(pages[:, start : start + words])
            states.append(part.view(dtype).reshape(pages.shape[0], *shape))
            start += words
        return tuple(states)

    def pack(self, states: Sequence[mx.array]) -> mx.array:
        """Return the page rows ``[blocks, words]`` of ``states``, padded with zeros: undoes ``unpack``."""
        if len(states) != len(self.shapes):
            raise SpecError(
                f"[RecurrentStateSpec.pack] expected {len(self.shapes)} arrays, got {len(states)}. "
                "Give every array of the state, in the order of the spec."
            )
        num_blocks = states[0].shape[0]
        parts = [
            mx.contiguous(state.astype(dtype).reshape(num_blocks, -1)).view(self.page_dtype)
            for state, dtype in zip(states, self.dtypes, strict=True)
        ]
        padding = self.page_shape[0] - sum(part.shape[1] for part in parts)
        if padding:
            parts.append(mx.zeros((num_blocks, padding), self.page_dtype))
        return mx.concatenate(parts, axis=1)


def with_block_size(spec: KVCacheSpec, block_size: int) -> KVCacheSpec:
    """Return ``spec`` with pages of another number of tokens."""
    return replace(spec, block_size=block_size)
