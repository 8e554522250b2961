"""How one token's keys and values lie in a page of a quantised cache."""

from dataclasses import dataclass
from typing import Literal, get_args

from metal_kernels.errors import MetalKernelsError

ElementFormat = Literal["fp8_e4m3", "int8", "int4", "float16", "bfloat16", "float32"]

ELEMENT_BITS: dict[ElementFormat, int] = {
    "fp8_e4m3": 8,
    "int8": 8,
    "int4": 4,
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
}
_WORD = 4
_ALIGNMENT = 16
_LARGEST_GROUP = 32


@dataclass(frozen=True)
class RowFormat:
    """The row of a token: data of all heads, then their scales, in 32-bit words.

    ::

        | key data     | value data   | key scales  | value scales | padding to 16 bytes |
          [head][size]   [head][size]   [head][group]  [head][group]

    A page is ``block_size`` such rows, so a slot is a row's number, and pages can be cut into smaller ones. With
    head sizes that are multiples of 32, the data of every head starts at a multiple of 16 bytes.

    ==========  ===========================================================  ==============================
    format      an element ``q``                                              a scale word
    ==========  ===========================================================  ==============================
    fp8_e4m3    8-bit float (1-4-3, no infinities, saturating); ``q * s``     float32 ``s`` of the head
    int8        two's complement in -127..127; ``q * s``                      float32 ``s`` of the head
    int4        0..15, element ``2i`` in the low half of a byte; ``q*s + b``  ``s`` low, ``b`` high, float16
    float*      as it is                                                      none
    ==========  ===========================================================  ==============================

    A group of int4 is as many elements of a head as 32 and the head size have in common.

    Attributes:
        num_kv_heads: Heads of keys and values.
        head_size: Elements of a head.
        key: Format of keys.
        value: Format of values.
        padded_bytes: Bytes of a row when it has to be longer than it needs: pages of layers that share memory have
            equal bytes.

    Raises:
        MetalKernelsError: An unknown format, a head size that does not fill words, or too little room.
    """

    num_kv_heads: int
    head_size: int
    key: ElementFormat
    value: ElementFormat
    padded_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be stored."""
        for element in (self.key, self.value):
            if element not in get_args(ElementFormat):
                raise MetalKernelsError(
                    f"[RowFormat] expected one of {', '.join(get_args(ElementFormat))}, got {element!r}. Choose one."
                )
        if self.num_kv_heads < 1 or self.head_size < 8 or self.head_size % 8:
            raise MetalKernelsError(
                f"[RowFormat] expected at least one head whose size is a multiple of 8, got {self.num_kv_heads} of "
                f"{self.head_size}. Store this layer in a floating-point cache."
            )
        if self.padded_bytes is not None and (
            self.padded_bytes < self.content_words * _WORD or self.padded_bytes % _WORD
        ):
            raise MetalKernelsError(
                f"[RowFormat] expected padded_bytes to be a multiple of {_WORD} and at least "
                f"{self.content_words * _WORD}, got {self.padded_bytes}. Pad to more bytes."
            )

    def group_size(self, element: ElementFormat) -> int:
        """Elements that share a scale word; 0 where elements have none."""
        if ELEMENT_BITS[element] > 8:
            return 0
        if element != "int4":
            return self.head_size
        return min(_LARGEST_GROUP, self.head_size & -self.head_size)

    def data_words(self, element: ElementFormat) -> int:
        """Words of all heads' elements."""
        return self.num_kv_heads * self.head_size * ELEMENT_BITS[element] // 32

    def scale_words(self, element: ElementFormat) -> int:
        """Words of all heads' scales."""
        group = self.group_size(element)
        return self.num_kv_heads * self.head_size // group if group else 0

    @property
    def content_words(self) -> int:
        """Words in use."""
        return self.part_ends[-1]

    @property
    def part_ends(self) -> tuple[int, int, int, int]:
        """Where key data, value data, key scales and value scales end, in words."""
        key_data = self.data_words(self.key)
        value_data = key_data + self.data_words(self.value)
        key_scales = value_data + self.scale_words(self.key)
        return (key_data, value_data, key_scales, key_scales + self.scale_words(self.value))

    @property
    def row_words(self) -> int:
        """Words of a row, padding included."""
        if self.padded_bytes is not None:
            return self.padded_bytes // _WORD
        words = _ALIGNMENT // _WORD
        return -(-self.content_words // words) * words

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: what one token takes in one layer."""
        return self.row_words * _WORD
