"""Which kernel variant serves a call, or why none does."""

from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import mlx.core as mx

from metal_kernels.device import Target
from metal_kernels.gated_delta_rows import GatedDeltaRows
from metal_kernels.linear_weights import LinearWeights
from metal_kernels.row_format import RowFormat

_Variant = TypeVar("_Variant")

FLOAT_DTYPES = (mx.float16, mx.bfloat16, mx.float32)
HEAD_SIZES = (64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (8, 16, 32)

_LOAD_BYTES = 16  # what a lane loads at once where the head size allows it
_MAX_HELD = 32  # floats of the query that a lane holds: as many for the output, and the keys beside them
_MAX_SHARED = 512  # floats of output that a SIMD-group puts into threadgroup memory for eight of them to fit
_MAX_QUANTIZED_HEAD = 256  # elements that a SIMD-group quantises, 8 a lane
_MAX_QUANTIZED_SHARED = 1024  # floats of output of a SIMD-group, where four put them into threadgroup memory
_MAX_LATENT_ROW = 768  # elements, of which threadgroup memory holds 16 rows
_MAX_DELTA_KEY = 256  # elements, of which a lane holds an eighth of two vectors and of some rows
_MAX_EXPERTS = 1024
_MAX_EXPERT_ROWS = 64
_FEW_EXPERT_ROWS = 16
_LARGE_EXPERT = 2**21  # elements of a weight
_MIN_CHANNELS = 8  # MLX passes smaller arrays as constant memory
_MAX_TILED_HEAD = 192  # beyond, four SIMD-groups' keys and values exceed threadgroup memory
_FUSED_HEAD_SIZES = (64, 80, 96, 128)
# What prefill costs on an H200, in microseconds and operations per microsecond: benchmarks/kernels/prefill_check.py.
_TILED_KEY = 0.06  # per key of the longest request, however few rows see it
_TILED_RATE = 1.2e8
_FUSED_REQUEST = 45.0
_FUSED_RATE = 5.5e8
_COPIED_ELEMENT = 2e-5
_MAX_LINEAR_ROWS = 32  # beyond, MLX's own matmuls are faster
_LINEAR_CODES = (4, 8)  # bits
_LINEAR_THREADGROUPS = 132  # that are under way at once
_MAX_WIDTH = 32768  # elements of a row that a threadgroup holds in registers


@dataclass(frozen=True)
class Accepted(Generic[_Variant]):
    """The variant to launch."""

    variant: _Variant


@dataclass(frozen=True)
class Rejected:
    """Why plain MLX has to do it."""

    why: str


@dataclass(frozen=True)
class PageKernels:
    """Writes, copies and gathers: they know no head size."""


@dataclass(frozen=True)
class RowKernels:
    """Norms and activations of a step's rows."""


@dataclass(frozen=True)
class DecodeVariant:
    """How paged decode is laid out; the names are the body's.

    Args:
        heads: Query heads of one threadgroup.
        lanes: Lanes that share a key.
        simdgroups: SIMD-groups of a threadgroup.
        unrolled: Keys that a lane loads before it uses one.
        parts: Threadgroups that share the query heads of one key head.
        ahead: Rounds between loading keys and using them, 0 or 1.
    """

    heads: int
    lanes: int
    simdgroups: int
    unrolled: int
    parts: int
    ahead: int = 0


@dataclass(frozen=True)
class QuantizedVariant:
    """How decode over quantised rows is laid out; the names are the body's.

    Args:
        heads: Query heads of one threadgroup.
        lanes: Lanes that share a key.
        width: Elements of a head that a lane holds.
        simdgroups: SIMD-groups of a threadgroup.
        unrolled: Keys that a lane loads before it uses one.
        parts: Threadgroups that share the query heads of one key head.
    """

    heads: int
    lanes: int
    width: int
    simdgroups: int
    unrolled: int
    parts: int


@dataclass(frozen=True)
class QuantizedMatrixVariant:
    """How decode over 8-bit rows on matrix units is laid out.

    Args:
        heads: Query heads of one threadgroup, at most 8.
        simdgroups: SIMD-groups of a threadgroup; each takes 16 keys at a time.
        parts: Threadgroups that share the query heads of one key head.
    """

    heads: int
    simdgroups: int
    parts: int


@dataclass(frozen=True)
class LatentVariant:
    """How decode over latent rows is laid out.

    Args:
        heads: Query heads of one threadgroup: the rows of a matrix.
        keys: Rows of the cache in threadgroup memory.
        simdgroups: SIMD-groups of a threadgroup.
    """

    heads: int
    keys: int
    simdgroups: int


@dataclass(frozen=True)
class ExpertVariant:
    """How linear layers of experts are laid out.

    Args:
        rows: Rows of two weights that a SIMD-group takes at once; of one weight it takes twice as many.
        simdgroups: SIMD-groups of a threadgroup.
        turns: How often it does so: looking for the rows of an expert costs as much as some turns.
    """

    rows: int
    simdgroups: int
    turns: int


@dataclass(frozen=True)
class GatedDeltaVariant:
    """How one token of a gated delta net is laid out.

    Args:
        simdgroups: SIMD-groups of a threadgroup, which has a key head: each takes 4 rows of its memory at a time.
        unrolled: Rows that a lane loads its part of before it uses one.
    """

    simdgroups: int
    unrolled: int


@dataclass(frozen=True)
class PrefillVariant:
    """How tiled prefill is laid out.

    Args:
        simdgroups: SIMD-groups of a threadgroup: each has 16 rows, and 8 keys of a tile.
    """

    simdgroups: int


@dataclass(frozen=True)
class LinearVariant:
    """How a linear layer on few rows is laid out; the names are the body's.

    Args:
        tiles: Rows of the weight that a threadgroup takes, in units of 16.
        columns: Rows of the input, in units of 8.
        simdgroups: SIMD-groups of a threadgroup: they share the inner axis.
        depth: Loads of weights that a lane has under way for each row of a tile.
    """

    tiles: int
    columns: int
    simdgroups: int
    depth: int


@dataclass(frozen=True)
class GatheredPrefill:
    """MLX's fused attention, request by request, over the step's own rows or copies of pages."""


def page_kernels(target: Target, dtype: mx.Dtype, size: int) -> Accepted[PageKernels] | Rejected:
    """Decide on the kernels that move rows and blocks of a cache of ``size`` elements."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"the cache is {dtype}; kernels know float16, bfloat16 and float32")
    if size < 8:
        return Rejected("MLX passes a cache of fewer than 8 elements as constant memory, which cannot be written")
    return Accepted(PageKernels())


def row_kernels(target: Target, dtype: mx.Dtype, width: int) -> Accepted[RowKernels] | Rejected:
    """Decide on the kernels between matmuls, for rows of ``width`` elements."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"rows are {dtype}; kernels know float16, bfloat16 and float32")
    if width % 4 or not 8 <= width <= _MAX_WIDTH:
        return Rejected(f"rows of {width} elements; kernels take multiples of 4 from 8 to {_MAX_WIDTH}")
    return Accepted(RowKernels())


@cache
def decode_kernel(
    target: Target,
    query_dtype: mx.Dtype,
    cache_dtype: mx.Dtype,
    head_size: int,
    block_size: int,
    group: int,
) -> Accepted[DecodeVariant] | Rejected:
    """Decide on paged decode for ``group`` query heads per key head."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype not in FLOAT_DTYPES or cache_dtype not in FLOAT_DTYPES:
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; kernels know float16, bfloat16 and float32")
    if head_size not in HEAD_SIZES:
        return Rejected(f"head size {head_size} is not one of {HEAD_SIZES}")
    if block_size not in BLOCK_SIZES:
        return Rejected(f"block size {block_size} is not one of {BLOCK_SIZES}")
    return Accepted(decode_variant(target, cache_dtype, head_size, group))


def rope_decode_kernel(
    target: Target,
    query_dtype: mx.Dtype,
    cache_dtype: mx.Dtype,
    head_size: int,
    block_size: int,
    group: int,
    rotary: int,
    traditional: bool,
) -> Accepted[DecodeVariant] | Rejected:
    """Decide on paged decode that rotates and writes its rows itself; ``rotary`` elements of a head rotate."""
    if rotary != head_size or traditional:
        return Rejected(f"{rotary} of {head_size} elements rotate; the kernel rotates the halves of whole heads")
    if query_dtype != cache_dtype:
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; the kernel takes both alike")
    decode = decode_kernel(target, query_dtype, cache_dtype, head_size, block_size, group)
    if isinstance(decode, Accepted) and decode.variant.parts > 1:
        return Rejected(f"{decode.variant.parts} threadgroups share a key head; which of them would write it is open")
    return decode


def decode_variant(target: Target, cache_dtype: mx.Dtype, head_size: int, group: int) -> DecodeVariant:
    """Lay out paged decode so that lanes load whole words and hold their share in registers."""
    width = _LOAD_BYTES // cache_dtype.size
    lanes = next((lanes for lanes in (8, 16, 32) if head_size % lanes == 0 and head_size // lanes <= width), 8)
    while head_size % (lanes * 2) == 0 and lanes < 32 and head_size // lanes > _MAX_HELD // 2:
        lanes *= 2
    held = head_size // lanes
    parts = -(-group // max(1, _MAX_HELD // held))
    heads = -(-group // parts)
    simdgroups = 8 if heads * head_size <= _MAX_SHARED else 4
    if target == "cuda" and cache_dtype.size == 2:
        if heads > 2 and held <= 8 and lanes > 8:  # bound by shuffles: fewer lanes for each key need fewer
            return DecodeVariant(heads, lanes // 2, 4, 2, parts, ahead=1)
        return DecodeVariant(heads, lanes, simdgroups, 4 if held <= 8 else 2, parts, ahead=1)
    return DecodeVariant(heads, lanes, simdgroups, 4 if held <= 8 else 2, parts)


@cache
def quantized_write_kernel(target: Target, row_format: RowFormat, size: int) -> Accepted[PageKernels] | Rejected:
    """Decide on the kernel that quantises rows into a cache of ``size`` words."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if size < 8:
        return Rejected("MLX passes a cache of fewer than 8 elements as constant memory, which cannot be written")
    if row_format.head_size > _MAX_QUANTIZED_HEAD:
        return Rejected(f"head size {row_format.head_size} is more than a SIMD-group holds ({_MAX_QUANTIZED_HEAD})")
    return Accepted(PageKernels())


@cache
def quantized_decode_kernel(
    target: Target, query_dtype: mx.Dtype, row_format: RowFormat, group: int
) -> Accepted[QuantizedVariant] | Accepted[QuantizedMatrixVariant] | Rejected:
    """Decide on decode over quantised rows for ``group`` query heads per key head."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype not in FLOAT_DTYPES:
        return Rejected(f"query is {query_dtype}; kernels know float16, bfloat16 and float32")
    head_size = row_format.head_size
    if head_size not in HEAD_SIZES:
        return Rejected(f"head size {head_size} is not one of {HEAD_SIZES}")
    eight_bits = {row_format.key, row_format.value} <= {"int8", "fp8_e4m3"}
    # Matrices are of float16, for rows of whole 16-byte words.
    if eight_bits and query_dtype != mx.float32 and row_format.row_words % 4 == 0:
        parts = -(-group // 8)
        return Accepted(QuantizedMatrixVariant(-(-group // parts), 4 if head_size <= _MAX_TILED_HEAD else 2, parts))
    # More heads of a threadgroup need more registers for each element; fewer elements leave room for them.
    width = 16 if group <= 2 else 8
    lanes = next(lanes for lanes in (4, 8, 16, 32) if lanes * width >= head_size)
    parts = -(-group // max(1, min(8, _MAX_QUANTIZED_SHARED // head_size)))
    return Accepted(QuantizedVariant(-(-group // parts), lanes, width, 4, 2, parts))


@cache
def mla_decode_kernel(
    target: Target, query_dtype: mx.Dtype, cache_dtype: mx.Dtype, latent_size: int, rope_size: int
) -> Accepted[LatentVariant] | Rejected:
    """Decide on decode over latent rows."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype != cache_dtype or query_dtype not in (mx.float16, mx.bfloat16):
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; the kernel takes both as float16 or bfloat16")
    variant = LatentVariant(heads=16, keys=16, simdgroups=4)
    if latent_size % (16 * variant.simdgroups) or rope_size % 16:
        return Rejected(
            f"latent size {latent_size} and rope size {rope_size}; the kernel takes multiples of "
            f"{16 * variant.simdgroups} and 16"
        )
    if latent_size + rope_size > _MAX_LATENT_ROW:
        return Rejected(f"rows of {latent_size + rope_size} elements; threadgroup memory holds {_MAX_LATENT_ROW}")
    return Accepted(variant)


@cache
def gated_delta_kernel(
    target: Target, dtype: mx.Dtype, page_words: int, rows: GatedDeltaRows
) -> Accepted[GatedDeltaVariant] | Rejected:
    """Decide on one token of a gated delta net, over pages of ``page_words`` words."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"rows are {dtype}; kernels know float16, bfloat16 and float32")
    if rows.k_size % 32 or rows.v_size % 32 or rows.k_size > _MAX_DELTA_KEY or rows.v_heads % rows.k_heads:
        return Rejected(
            f"keys of {rows.k_size} and values of {rows.v_size} elements, {rows.v_heads} value heads for "
            f"{rows.k_heads} key heads; the kernel takes multiples of 32 up to {_MAX_DELTA_KEY}, and of the key heads"
        )
    history_words, _ = rows.state_words(dtype)
    if rows.taps < 2 or history_words % 4 or page_words % 4:
        return Rejected(
            f"{history_words} words before the memory in pages of {page_words}; the kernel loads 16 bytes at a time"
        )
    values = rows.v_heads // rows.k_heads * rows.v_size
    layouts = ((16, 2), (8, 2), (8, 1)) if target == "cuda" else ((8, 2), (8, 1))
    simdgroups, unrolled = next(layout for layout in layouts if values % (4 * layout[0] * layout[1]) == 0)
    return Accepted(GatedDeltaVariant(simdgroups, unrolled))


def routing_kernel(target: Target, dtype: mx.Dtype, experts: int) -> Accepted[RowKernels] | Rejected:
    """Decide on the kernel that chooses among so many experts."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"logits are {dtype}; kernels know float16, bfloat16 and float32")
    if not _MIN_CHANNELS <= experts <= _MAX_EXPERTS:
        return Rejected(f"{experts} experts; a SIMD-group holds {_MIN_CHANNELS} to {_MAX_EXPERTS} logits")
    return Accepted(RowKernels())


def expert_kernel(
    target: Target, dtype: mx.Dtype, weight_dtype: mx.Dtype, shape: tuple[int, ...], tokens: int
) -> Accepted[ExpertVariant] | Rejected:
    """Decide on the kernel for weights of ``shape`` ``[experts, output, input]`` and a step of ``tokens`` rows."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES or weight_dtype != dtype:
        return Rejected(f"rows are {dtype}, weights {weight_dtype}; the kernel takes both in one float type")
    _, output, size = shape
    if output % 4 or size % 8:
        return Rejected(f"weights of {output} rows of {size} elements; the kernel takes multiples of 4 and of 8")
    if not 0 < tokens <= _MAX_EXPERT_ROWS:
        return Rejected(f"{tokens} rows; for more than {_MAX_EXPERT_ROWS} matrix units are faster")
    if tokens > _FEW_EXPERT_ROWS and output * size > _LARGE_EXPERT:
        return Rejected(f"{tokens} rows of experts of {output} x {size}; MLX's grouped matmul is faster")
    return Accepted(ExpertVariant(rows=2, simdgroups=4, turns=1 if tokens <= _FEW_EXPERT_ROWS else 4))


def short_conv_kernel(target: Target, dtype: mx.Dtype, width: int, taps: int) -> Accepted[RowKernels] | Rejected:
    """Decide on one token of a gated short convolution of ``width`` channels."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if dtype not in FLOAT_DTYPES:
        return Rejected(f"rows are {dtype}; kernels know float16, bfloat16 and float32")
    if taps < 2 or (taps - 1) * width * dtype.size % 4 or width < _MIN_CHANNELS:
        return Rejected(
            f"{taps} taps of {width} channels; a state has whole words, of at least {_MIN_CHANNELS} channels"
        )
    return Accepted(RowKernels())


@cache
def prefill_kernel(
    target: Target, query_dtype: mx.Dtype, cache_dtype: mx.Dtype, head_size: int
) -> Accepted[PrefillVariant] | Rejected:
    """Decide on the kernel for requests with several rows."""
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if query_dtype != cache_dtype or query_dtype not in (mx.float16, mx.bfloat16):
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; the kernel takes both as float16 or bfloat16")
    if head_size not in HEAD_SIZES:
        return Rejected(f"head size {head_size} is not one of {HEAD_SIZES}")
    return Accepted(PrefillVariant(simdgroups=4 if head_size <= _MAX_TILED_HEAD else 2))


@dataclass(frozen=True)
class PrefillWork:
    """What requests with several rows ask of attention.

    Args:
        reqs: Number of requests.
        rows: Of all of them.
        keys: To be copied out of pages, of all of them.
        pairs: Of rows and keys that they see, in all of them.
        longest: Keys of the longest request.
    """

    reqs: int
    rows: int
    keys: int
    pairs: int
    longest: int

    def tiled_time(self, q_heads: int, head_size: int) -> float:
        """Estimated microseconds of the tiled kernel; measured with CUDA."""
        return max(_TILED_KEY * self.longest, 4 * self.pairs * q_heads * head_size / _TILED_RATE)

    def gathered_time(self, q_heads: int, kv_heads: int, head_size: int) -> float:
        """Estimated microseconds of copies and MLX's fused attention; measured with CUDA."""
        copies = _COPIED_ELEMENT * self.keys * kv_heads * head_size
        return _FUSED_REQUEST * self.reqs + copies + 4 * self.pairs * q_heads * head_size / _FUSED_RATE


def gathered_prefill(
    target: Target,
    query_dtype: mx.Dtype,
    cache_dtype: mx.Dtype,
    heads: tuple[int, int, int],
    work: PrefillWork,
    masked: bool,
) -> Accepted[GatheredPrefill] | Rejected:
    """Decide on copies of keys and values and MLX's fused attention.

    ``heads`` are query heads, key heads and head size; ``masked`` is whether scores are capped or a window hides keys.
    """
    q_heads, kv_heads, head_size = heads
    if target == "cpu":
        return Rejected("the default device is a CPU")
    if masked:
        return Rejected("MLX's fused attention has no soft cap, and a window only as an array")
    if query_dtype != cache_dtype or query_dtype not in (mx.float16, mx.bfloat16):
        return Rejected(f"query is {query_dtype}, cache {cache_dtype}; MLX fuses float16 and bfloat16")
    if head_size not in _FUSED_HEAD_SIZES:
        return Rejected(f"head size {head_size} is not one of {_FUSED_HEAD_SIZES}, which MLX fuses")
    tiled, gathered = work.tiled_time(q_heads, head_size), work.gathered_time(q_heads, kv_heads, head_size)
    if tiled <= gathered:
        return Rejected(
            f"tiled attention is estimated at {tiled:.0f} us, copies and fused attention at {gathered:.0f}"
        )
    return Accepted(GatheredPrefill())


def linear_kernel(
    target: Target, dtype: mx.Dtype, weights: LinearWeights, rows: int, *, normed: bool = False, gated: bool = False
) -> Accepted[LinearVariant] | Rejected:
    """Decide on the kernel of a linear layer on ``rows`` rows, after a norm or with half of its outputs as gates."""
    if target != "cuda":
        return Rejected(f"the target is {target}; the layout was timed on CUDA alone, where MLX's launches cost most")
    if dtype not in (mx.float16, mx.bfloat16) or (normed and dtype == mx.float16):
        return Rejected(f"rows are {dtype}; the kernel takes float16 or, where it weighs a norm's input, bfloat16")
    if rows > _MAX_LINEAR_ROWS:
        return Rejected(f"{rows} rows; beyond {_MAX_LINEAR_ROWS} MLX's own matmuls are faster")
    if weights.bits is None and weights.weight.dtype != dtype:
        return Rejected(f"the weight is {weights.weight.dtype}, rows are {dtype}; the kernel takes both alike")
    if weights.bits is not None and (weights.bits not in _LINEAR_CODES or weights.biases is None):
        return Rejected(f"codes of {weights.bits} bits; the kernel takes {_LINEAR_CODES}, with scales and biases")
    run = 8 if weights.bits is None else 128 // weights.bits
    if weights.inputs % (4 * run) or weights.outputs % (32 if gated else 16) or weights.group_size % run:
        return Rejected(
            f"{weights.outputs} x {weights.inputs} weights in groups of {weights.group_size}; the kernel takes "
            f"multiples of {32 if gated else 16} and {4 * run}, and groups of whole runs of {run}"
        )
    return Accepted(linear_variant(rows, weights.inputs // (4 * run), weights.outputs, gated))


def linear_variant(rows: int, chunks: int, outputs: int, gated: bool) -> LinearVariant:
    """Lay out a linear layer whose inner axis has so many chunks, so that its threadgroups are there at once."""
    columns = next(columns for columns in (1, 2, 4) if 8 * columns >= rows)
    whole = [tiles for tiles in (1, 2, 3, 4) if outputs % (16 * tiles) == 0]
    tiles = next((tiles for tiles in whole if outputs <= 16 * tiles * _LINEAR_THREADGROUPS), 2 if 2 in whole else 1)
    simdgroups = 16 if tiles == 1 and chunks >= 32 else 8
    turns = -(-chunks // simdgroups)
    # Loads of three tiles at once take registers that lanes need otherwise.
    depths = (2, 1) if tiles > 2 else (4, 2, 3, 1)
    depth = next((depth for depth in depths if turns % depth == 0), 1)
    return LinearVariant(tiles, columns, simdgroups, depth)
