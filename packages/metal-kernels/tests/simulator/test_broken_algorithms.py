"""Common algorithms, each right as written: every edit that breaks one is caught, for its reason and at its line."""

import re
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels.simulator import FaultKind, KernelFault, metal_kernel, settings

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass
class Edit:
    """One change to a kernel, what is then found, and the line (by its text after the edit) that is named."""

    old: str
    new: str
    kind: FaultKind
    at: str | None = None


@dataclass
class Algorithm:
    """A kernel that computes ``expected`` from ``inputs`` into ``out``."""

    source: str
    inputs: dict[str, np.ndarray]
    expected: np.ndarray
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    edits: dict[str, Edit]
    header: str = ""
    call: dict[str, Any] = field(default_factory=dict)


def ramp(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 17 / 4 - 2).astype(np.float32).reshape(shape)


TRANSPOSE = Algorithm(
    """
    constexpr uint TILE = 8, ROWS = 20, COLS = 12;
    threadgroup float tile[TILE][TILE + 1];
    const uint2 t = thread_position_in_threadgroup.xy, g = threadgroup_position_in_grid.xy;
    uint row = g.y * TILE + t.y, col = g.x * TILE + t.x;
    if (row < ROWS && col < COLS)
        tile[t.y][t.x] = a[row * COLS + col];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint row_out = g.x * TILE + t.y, col_out = g.y * TILE + t.x;
    if (row_out < COLS && col_out < ROWS)
        out[row_out * ROWS + col_out] = tile[t.x][t.y];
    """,
    {"a": ramp(20, 12)},
    ramp(20, 12).T,
    (16, 24, 1),
    (8, 8, 1),
    {
        "no_guard_in_second_dimension": Edit(
            "row < ROWS && col < COLS", "col < COLS", FaultKind.OUT_OF_BOUNDS_READ, "= a[row * COLS"
        ),
        "guard_off_by_one": Edit("col < COLS)", "col <= COLS)", FaultKind.OUT_OF_BOUNDS_READ, "= a[row * COLS"),
        "no_guard_on_output": Edit(
            "if (row_out < COLS && col_out < ROWS)", "", FaultKind.UNINITIALISED_READ, "= tile[t.x]"
        ),
        "wrong_row_stride_of_output": Edit(
            "out[row_out * ROWS", "out[row_out * COLS", FaultKind.RACE_BETWEEN_THREADGROUPS, "= tile[t.x]"
        ),
        "column_beyond_the_tile": Edit(
            "tile[t.x][t.y]", "tile[t.x + 1][t.y]", FaultKind.ARRAY_INDEX, "= tile[t.x + 1]"
        ),
        "no_barrier": Edit(BARRIER, "", FaultKind.RACE_IN_THREADGROUP, "= tile[t.x]"),
        "barrier_for_device_memory": Edit(
            "mem_threadgroup", "mem_device", FaultKind.RACE_IN_THREADGROUP, "= tile[t.x]"
        ),
    },
)

MATMUL = Algorithm(
    """
    constexpr int T = 8;
    threadgroup float left[T][T], right[T][T];
    int tx = thread_position_in_threadgroup.x, ty = thread_position_in_threadgroup.y;
    int row = thread_position_in_grid.y, col = thread_position_in_grid.x;
    int m = a_shape[0], depth = a_shape[1], n = b_shape[1];
    float sum = 0;
    for (int k = 0; k < depth; k += T) {
        left[ty][tx] = row < m && k + tx < depth ? a[row * depth + k + tx] : 0.0f;
        right[ty][tx] = k + ty < depth && col < n ? b[(k + ty) * n + col] : 0.0f;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int j = 0; j < T; ++j)
            sum = fma(left[ty][j], right[j][tx], sum);
        threadgroup_barrier(mem_flags::mem_none | mem_flags::mem_threadgroup);
    }
    if (row < m && col < n)
        out[row * n + col] = sum;
    """,
    {"a": ramp(10, 20), "b": ramp(20, 12)},
    ramp(10, 20) @ ramp(20, 12),
    (16, 16, 1),
    (8, 8, 1),
    {
        "no_barrier_before_the_product": Edit(BARRIER, "", FaultKind.RACE_IN_THREADGROUP, "sum = fma"),
        "no_barrier_before_the_next_tile": Edit(
            "threadgroup_barrier(mem_flags::mem_none | mem_flags::mem_threadgroup);",
            "",
            FaultKind.RACE_IN_THREADGROUP,
            "left[ty][tx] = row < m",
        ),
        "rows_beyond_the_matrix_leave": Edit(
            "float sum = 0;", "float sum = 0; if (row >= m) return;", FaultKind.MISSING_THREADS_AT_BARRIER
        ),
        "barriers_in_a_branch": Edit(
            BARRIER, "if (row < m) " + BARRIER, FaultKind.DIVERGENT_BARRIER, "if (row < m) threadgroup_barrier"
        ),
        "tile_without_zero_fill": Edit(
            "left[ty][tx] = row < m && k + tx < depth ? a[row * depth + k + tx] : 0.0f",
            "if (row < m && k + tx < depth) left[ty][tx] = a[row * depth + k + tx]",
            FaultKind.UNINITIALISED_READ,
            "sum = fma",
        ),
        "depth_guard_missing": Edit(
            "k + ty < depth && col < n ?", "col < n ?", FaultKind.OUT_OF_BOUNDS_READ, "b[(k + ty)"
        ),
        "inner_loop_too_long": Edit("j < T", "j <= T", FaultKind.ARRAY_INDEX, "sum = fma"),
        "row_guard_missing": Edit(
            "if (row < m && col < n)", "if (col < n)", FaultKind.OUT_OF_BOUNDS_WRITE, "out[row * n"
        ),
        "column_guard_missing": Edit(
            "if (row < m && col < n)", "if (row < m)", FaultKind.RACE_BETWEEN_THREADGROUPS, "out[row * n"
        ),
        "accumulates_in_the_output": Edit(
            "out[row * n + col] = sum;", "out[row * n + col] += sum;", FaultKind.UNINITIALISED_READ, "out[row * n"
        ),
    },
)

SOFTMAX = Algorithm(
    """
    constexpr uint WIDTH = 50, SIMDS = 2;
    threadgroup float shared[SIMDS];
    uint row = threadgroup_position_in_grid.x, lid = thread_index_in_threadgroup;
    uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    float v = lid < WIDTH ? x[row * WIDTH + lid] : -INFINITY;
    float best = simd_max(v);
    if (lane == 0) shared[sg] = best;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    best = max(shared[0], shared[1]);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // every thread has read
    float e = metal::fast::exp(v - best), total = simd_sum(e);
    if (simd_is_first()) shared[sg] = total;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    total = simd_sum(lane < SIMDS ? shared[lane] : 0.0f);
    if (lid < WIDTH) out[row * WIDTH + lid] = e / total;
    """,
    {"x": ramp(3, 50)},
    np.exp(ramp(3, 50)) / np.exp(ramp(3, 50)).sum(-1, keepdims=True),
    (192, 1, 1),
    (64, 1, 1),
    {
        "scratch_reused_too_early": Edit(
            BARRIER + "  // every thread has read", "", FaultKind.RACE_IN_THREADGROUP, "if (simd_is_first())"
        ),
        "scratch_for_one_simdgroup": Edit(
            "threadgroup float shared[SIMDS]",
            "threadgroup float shared[1]",
            FaultKind.ARRAY_INDEX,
            "shared[sg] = best",
        ),
        "all_lanes_read_the_scratch": Edit(
            "lane < SIMDS ? shared[lane] : 0.0f",
            "((threadgroup float*)shared)[lane]",
            FaultKind.OUT_OF_BOUNDS_READ,
            "total = simd_sum(((",
        ),
        "all_lanes_write_the_scratch": Edit(
            "if (lane == 0) shared[sg] = best;",
            "shared[sg] = v;",
            FaultKind.RACE_IN_THREADGROUP,
            "shared[sg] = v;",
        ),
        "simdgroup_barrier_is_too_narrow": Edit(
            "threadgroup_barrier(mem_flags::mem_threadgroup);\n    best",
            "simdgroup_barrier(mem_flags::mem_threadgroup);\n    best",
            FaultKind.RACE_IN_THREADGROUP,
            "best = max(shared[0]",
        ),
        "tail_of_the_row_not_written": Edit(
            "if (lid < WIDTH) out", "if (lid < WIDTH / 4 * 4) out", FaultKind.NEVER_WRITTEN
        ),
        "tail_of_the_row_not_guarded": Edit(
            "lid < WIDTH ? x[row * WIDTH + lid] : -INFINITY",
            "x[row * WIDTH + lid]",
            FaultKind.OUT_OF_BOUNDS_READ,
            "float v = x[",
        ),
        "row_written_over_the_next": Edit(
            "if (lid < WIDTH) out", "out", FaultKind.RACE_BETWEEN_THREADGROUPS, "out[row * WIDTH"
        ),
    },
)

SCAN = Algorithm(
    """
    threadgroup float buffer[2][64];
    uint lid = thread_position_in_threadgroup.x, from = 0;
    buffer[0][lid] = x[thread_position_in_grid.x];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint step = 1; step < 64; step *= 2) {
        float v = buffer[from][lid];
        if (lid >= step) v += buffer[from][lid - step];
        from = 1 - from;
        buffer[from][lid] = v;
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    out[thread_position_in_grid.x] = buffer[from][lid];
    """,
    {"x": ramp(128)},
    np.cumsum(ramp(128).reshape(2, 64), -1).ravel(),
    (128, 1, 1),
    (64, 1, 1),
    {
        "one_buffer": Edit("from = 1 - from;", "", FaultKind.RACE_IN_THREADGROUP, "buffer[from][lid] = v;"),
        "no_barrier_in_the_loop": Edit(
            BARRIER + "\n    }", "}", FaultKind.RACE_IN_THREADGROUP, "v += buffer[from][lid - step]"
        ),
        "reads_before_the_buffer": Edit(
            "if (lid >= step) v", "v", FaultKind.ARRAY_INDEX, "v += buffer[from][lid - step]"
        ),
        "lanes_leave_the_loop": Edit(
            "step < 64;", "step <= lid;", FaultKind.MISSING_THREADS_AT_BARRIER, "threadgroup_barrier"
        ),
        "reads_the_other_buffer": Edit(
            "float v = buffer[from][lid];",
            "float v = buffer[1 - from][lid];",
            FaultKind.UNINITIALISED_READ,
            "float v = buffer[1",
        ),
    },
)

HISTOGRAM = Algorithm(
    """
    threadgroup atomic_uint bins[16];
    uint lid = thread_position_in_threadgroup.x;
    if (lid < 16) atomic_store_explicit(bins + lid, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uchar value = codes[thread_position_in_grid.x];
    atomic_fetch_add_explicit(&bins[value & 15], 1u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint count = 0;
    device atomic_uint* counts = (device atomic_uint*)out;
    if (lid < 16)
        count = atomic_load_explicit(&bins[lid], memory_order_relaxed);
    if (lid < 16) atomic_fetch_add_explicit(&counts[lid], count, memory_order_relaxed);
    """,
    {"codes": (np.arange(256) * 7 % 23).astype(np.uint8)},
    np.bincount(np.arange(256) * 7 % 23 % 16, minlength=16).astype(np.uint32),
    (256, 1, 1),
    (64, 1, 1),
    {
        "bins_not_cleared": Edit(
            "if (lid < 16) atomic_store_explicit(bins + lid, 0u, memory_order_relaxed);",
            "",
            FaultKind.UNINITIALISED_READ,
            "&bins[value & 15]",
        ),
        "half_of_the_bins_cleared": Edit(
            "if (lid < 16) atomic_store",
            "if (lid < 8) atomic_store",
            FaultKind.UNINITIALISED_READ,
            "&bins[value & 15]",
        ),
        "code_beyond_the_bins": Edit("value & 15", "value", FaultKind.ARRAY_INDEX, "&bins[value]"),
        "plain_counts_in_the_threadgroup": Edit(
            "atomic_fetch_add_explicit(&bins[value & 15], 1u, memory_order_relaxed);",
            "((threadgroup uint*)bins)[value & 15] += 1;",
            FaultKind.RACE_IN_THREADGROUP,
            "((threadgroup uint*)bins)",
        ),
        "plain_counts_in_the_output": Edit(
            "atomic_fetch_add_explicit(&counts[lid], count, memory_order_relaxed);",
            "out[lid] += count;",
            FaultKind.RACE_BETWEEN_THREADGROUPS,
            "out[lid] += count",
        ),
        "bins_beyond_the_last": Edit(
            "if (lid < 16)\n", "if (lid < 17)\n", FaultKind.OUT_OF_BOUNDS_READ, "count = atomic"
        ),
        "counts_beyond_the_output": Edit(
            "if (lid < 16) atomic_fetch", "if (lid < 17) atomic_fetch", FaultKind.OUT_OF_BOUNDS_READ, "&counts[lid]"
        ),
    },
    call={"init_value": 0},
)

LAYER_NORM = Algorithm(
    """
    constexpr int N = 96;
    threadgroup float2 sums[32];
    uint lid = thread_position_in_threadgroup.x;
    const device float* row = x + threadgroup_position_in_grid.y * N;
    float2 own = 0;
    for (int c = lid; c < N; c += 32) own += float2(row[c], row[c] * row[c]);
    sums[lid] = own;
    for (uint half_size = 16; half_size > 0; half_size >>= 1) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (lid < half_size) sums[lid] += sums[lid + half_size];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the sums are whole
    float mean = sums[0].x / N, scale = rsqrt(sums[0].y / N - mean * mean + eps);
    for (int c = lid; c < N; c += 32)
        out[threadgroup_position_in_grid.y * N + c] = (row[c] - mean) * scale * w[c];
    """,
    {"x": ramp(3, 96), "w": ramp(96), "eps": np.float32(1e-3)},
    (ramp(3, 96) - ramp(3, 96).mean(-1, keepdims=True))
    / np.sqrt(ramp(3, 96).var(-1, keepdims=True) + 1e-3)
    * ramp(96),
    (32, 3, 1),
    (32, 1, 1),
    {
        "tree_without_barriers": Edit(
            BARRIER + "\n        if", "if", FaultKind.RACE_IN_THREADGROUP, "sums[lid] += sums"
        ),
        "tree_with_barriers_in_the_branch": Edit(
            BARRIER + "\n        if (lid < half_size) sums[lid] += sums[lid + half_size];",
            "if (lid < half_size) {\n        " + BARRIER + "\n        sums[lid] += sums[lid + half_size]; }",
            FaultKind.DIVERGENT_BARRIER,
        ),
        "tree_one_too_wide": Edit(
            "uint half_size = 16", "uint half_size = 32", FaultKind.ARRAY_INDEX, "sums[lid] += sums"
        ),
        "sums_read_too_early": Edit(
            BARRIER + "  // the sums are whole", "", FaultKind.RACE_IN_THREADGROUP, "float mean = sums[0]"
        ),
        "weight_of_the_next_column": Edit("* w[c]", "* w[c + 1]", FaultKind.OUT_OF_BOUNDS_READ, "* scale * w["),
        "row_of_the_next_threadgroup": Edit(
            "x + threadgroup_position_in_grid.y * N",
            "x + (threadgroup_position_in_grid.y + 1) * N",
            FaultKind.OUT_OF_BOUNDS_READ,
            "own += float2(row[c]",
        ),
        "one_row_for_all": Edit(
            "out[threadgroup_position_in_grid.y * N + c]",
            "out[c]",
            FaultKind.RACE_BETWEEN_THREADGROUPS,
            "out[c] = (row[c]",
        ),
        "columns_skipped": Edit("c += 32)\n        out", "c += 64)\n        out", FaultKind.NEVER_WRITTEN),
    },
)

BITONIC_SORT = Algorithm(
    """
    threadgroup half keys[64];
    const ushort lid = thread_position_in_threadgroup.x;
    keys[lid] = half(x[lid]);
    for (ushort size = 2; size <= 64; size <<= 1) {
        for (ushort stride = size / 2; stride > 0; stride >>= 1) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            ushort other = lid ^ stride;
            if (other > lid) {
                half low = min(keys[lid], keys[other]), high = max(keys[lid], keys[other]);
                bool up = (lid & size) == 0;
                keys[lid] = up ? low : high;
                keys[other] = up ? high : low;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // sorted
    if (lid < 10) out[lid] = keys[63 - lid];
    """,
    {"x": ramp(64)},
    np.sort(ramp(64))[::-1][:10].copy(),
    (64, 1, 1),
    (64, 1, 1),
    {
        "no_barrier_between_the_stages": Edit(
            BARRIER + "\n            ushort", "ushort", FaultKind.RACE_IN_THREADGROUP, "half low = min"
        ),
        "both_of_a_pair_exchange": Edit("if (other > lid)", "", FaultKind.RACE_IN_THREADGROUP),
        "no_barrier_at_the_end": Edit(BARRIER + "  // sorted", "", FaultKind.RACE_IN_THREADGROUP, "out[lid] = keys"),
        "too_few_keys_loaded": Edit(
            "keys[lid] = half(x[lid]);", "if (lid < 60) keys[lid] = half(x[lid]);", FaultKind.UNINITIALISED_READ
        ),
        "more_results_than_room": Edit("lid < 10", "lid < 11", FaultKind.OUT_OF_BOUNDS_WRITE, "out[lid] = keys"),
        "last_key_beyond_the_end": Edit("keys[63 - lid]", "keys[64 - lid]", FaultKind.ARRAY_INDEX, "out[lid] = keys"),
    },
)

CONVOLUTION = Algorithm(
    """
    constexpr int TAPS = 5, HALO = TAPS / 2, WIDTH = 32;
    threadgroup float line[WIDTH + 2 * HALO];
    int lid = thread_position_in_threadgroup.x, first = threadgroup_position_in_grid.x * WIDTH;
    for (int k = lid; k < WIDTH + 2 * HALO; k += WIDTH) {
        int at = first + k - HALO;
        line[k] = at >= 0 && at < n ? x[at] : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0;
    for (int k = 0; k < TAPS; k++) sum += line[lid + k] * taps[k];
    if (first + lid < n) out[first + lid] = sum;
    """,
    {"x": ramp(70), "taps": np.array([1, 2, 3, -2, 1], np.float32), "n": np.int32(70)},
    np.convolve(ramp(70), np.array([1, 2, 3, -2, 1], np.float32)[::-1], "same"),
    (96, 1, 1),
    (32, 1, 1),
    {
        "left_border_not_guarded": Edit("at >= 0 && at < n", "at < n", FaultKind.OUT_OF_BOUNDS_READ, "line[k] = at"),
        "right_border_not_guarded": Edit("at >= 0 && at < n", "at >= 0", FaultKind.OUT_OF_BOUNDS_READ, "line[k] = at"),
        "halo_not_loaded": Edit(
            "k < WIDTH + 2 * HALO; k += WIDTH", "k < WIDTH; k += WIDTH", FaultKind.UNINITIALISED_READ, "sum += line"
        ),
        "halo_has_no_room": Edit(
            "line[WIDTH + 2 * HALO];", "line[WIDTH + HALO];", FaultKind.ARRAY_INDEX, "line[k] = at"
        ),
        "one_tap_too_many": Edit("k < TAPS", "k <= TAPS", FaultKind.OUT_OF_BOUNDS_READ, "sum += line"),
        "no_barrier_after_loading": Edit(BARRIER, "", FaultKind.RACE_IN_THREADGROUP, "sum += line"),
        "output_not_guarded": Edit(
            "if (first + lid < n) out", "out", FaultKind.OUT_OF_BOUNDS_WRITE, "out[first + lid]"
        ),
    },
)

BLOCK_MATMUL = Algorithm(
    """
    threadgroup half left[16 * 16], right[16 * 16];
    uint lid = thread_index_in_threadgroup, sg = simdgroup_index_in_threadgroup;
    for (uint k = lid; k < 256; k += 128) left[k] = half(a[k]), right[k] = half(b[k]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint row = sg / 2 * 8, col = sg % 2 * 8;
    simdgroup_matrix<float, 8, 8> sum(0);
    for (uint k = 0; k < 16; k += 8) {
        simdgroup_half8x8 p, q;
        simdgroup_load(p, left + row * 16 + k, 16);
        simdgroup_load(q, right, 16, ulong2(col, k));
        simdgroup_multiply_accumulate(sum, p, q, sum);
    }
    simdgroup_store(sum, out + row * 16 + col, 16);
    """,
    {"a": ramp(16, 16), "b": ramp(16, 16)[::-1].copy()},
    ramp(16, 16) @ ramp(16, 16)[::-1],
    (128, 1, 1),
    (128, 1, 1),
    {
        "no_barrier_after_staging": Edit(BARRIER, "", FaultKind.RACE_IN_THREADGROUP, "simdgroup_load(p"),
        "blocks_overlap": Edit(
            "+ row * 16 + col, 16);", "+ row * 16 + col / 2, 16);", FaultKind.RACE_IN_THREADGROUP, "simdgroup_store"
        ),
        "a_block_is_missing": Edit("simdgroup_store(sum", "if (sg != 2) simdgroup_store(sum", FaultKind.NEVER_WRITTEN),
        "depth_too_long": Edit(
            "k < 16; k += 8) {", "k < 24; k += 8) {", FaultKind.OUT_OF_BOUNDS_READ, "simdgroup_load("
        ),
        "wrong_stride_of_output": Edit(
            "row * 16 + col, 16);", "row * 16 + col, 32);", FaultKind.OUT_OF_BOUNDS_WRITE, "simdgroup_store"
        ),
        "accumulator_not_initialised": Edit("sum(0);", "sum;", FaultKind.UNINITIALISED_VARIABLE),
    },
)

DEQUANTIZE = Algorithm(
    """
    uint i = thread_position_in_grid.x;
    if (i >= uint(w_shape[0])) return;
    uint word = w[i];
    half2 affine = half2(half(scales[i / 4]), half(biases[i / 4]));
    float4 low, high;
    for (uint k = 0; k < 4; k++) {
        low[k] = float(fma(half(word >> (4 * k) & 0xF), affine.x, affine.y));
        high[k] = float(fma(half(word >> (16 + 4 * k) & 0xF), affine.x, affine.y));
    }
    device float4* to = (device float4*)(out + i * 8);
    to[0] = low;
    to[1] = high;
    """,
    {
        "w": (np.arange(20, dtype=np.uint64) * 0x9E3779B1 % (1 << 32)).astype(np.uint32),
        "scales": np.array([0.5, 1, 2, 0.25, 1], np.float32),
        "biases": np.array([-1, 0, 1, 2, -2], np.float32),
    },
    (
        (
            (np.arange(20, dtype=np.uint64) * 0x9E3779B1 % (1 << 32))[:, None] >> np.arange(0, 32, 4, dtype=np.uint64)
            & 15
        )
        * np.repeat([0.5, 1, 2, 0.25, 1], 4)[:, None]
        + np.repeat([-1, 0, 1, 2, -2], 4)[:, None]
    ).ravel(),
    (32, 1, 1),
    (32, 1, 1),
    {
        "guard_lets_one_in": Edit("if (i >= uint", "if (i > uint", FaultKind.OUT_OF_BOUNDS_READ, "uint word = w[i]"),
        "group_of_the_wrong_size": Edit(
            "scales[i / 4]", "scales[i / 3]", FaultKind.OUT_OF_BOUNDS_READ, "half2 affine"
        ),
        "store_not_aligned": Edit(
            "(device float4*)(out + i * 8);",
            "(device float4*)(out + i * 8 + (i & 1));",
            FaultKind.MISALIGNED,
            "to[0] = low",
        ),
        "half_of_the_words_written": Edit("to[1] = high;", "", FaultKind.NEVER_WRITTEN),
        "words_overlap": Edit(
            "(device float4*)(out + i * 8);", "(device float4*)(out + i * 4);", FaultKind.RACE_IN_THREADGROUP, "to["
        ),
        "high_nibbles_forgotten": Edit(
            "high[k] = float(fma(half(word >> (16 + 4 * k) & 0xF), affine.x, affine.y));",
            "if (k) high[k] = low[k];",
            FaultKind.UNINITIALISED_VARIABLE,
        ),
    },
)

EMBEDDING = Algorithm(
    """
    uint3 p = thread_position_in_grid;
    int id = ids[p.z * 3 + p.y];
    uint to = (p.z * 3 + p.y) * 16 + p.x;
    out[to] = id >= 0 && id < 6 ? table[id * 16 + p.x] : T(0);
    """,
    {"ids": np.array([0, 5, -1, 2, 2, 9], np.int32), "table": ramp(6, 16)},
    np.stack([ramp(6, 16)[k] if 0 <= k < 6 else np.zeros(16, np.float32) for k in (0, 5, -1, 2, 2, 9)]).ravel(),
    (16, 3, 2),
    (16, 1, 2),
    {
        "padding_id": Edit("id >= 0 && id < 6", "id < 6", FaultKind.OUT_OF_BOUNDS_READ, "out[to] ="),
        "unknown_id": Edit("id >= 0 && id < 6", "id >= 0", FaultKind.OUT_OF_BOUNDS_READ, "out[to] ="),
        "last_dimension_too_wide": Edit("ids[p.z * 3", "ids[p.z * 4", FaultKind.OUT_OF_BOUNDS_READ, "int id = ids"),
        "dimensions_collide": Edit(
            "uint to = (p.z * 3 + p.y)", "uint to = (p.z * 2 + p.y)", FaultKind.RACE_BETWEEN_THREADGROUPS, "out[to] ="
        ),
        "lanes_collide": Edit("* 16 + p.x;", "* 16 + p.x / 2;", FaultKind.RACE_IN_THREADGROUP, "out[to] ="),
    },
    call={"template": [("T", mx.float32)]},
)

LAST_BLOCK = Algorithm(
    """
    threadgroup uint last;
    uint lid = thread_position_in_threadgroup.x, group = threadgroup_position_in_grid.x;
    device float* partial = out + 1;
    float sum = simd_sum(x[thread_position_in_grid.x]);
    if (lid == 0) {
        partial[group] = sum;
        atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
        last = atomic_fetch_add_explicit((device atomic_uint*)out, 1u, memory_order_relaxed) + 1;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (last == threadgroups_per_grid.x) {
        atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
        float total = simd_sum(lid < last ? partial[lid] : 0.0f);
        if (lid == 0) partial[last] = total;
    }
    """,
    {"x": ramp(128)},
    np.concatenate([[np.uint32(4).view(np.float32)], ramp(128).reshape(4, 32).sum(-1), [ramp(128).sum()]]),
    (128, 1, 1),
    (32, 1, 1),
    {
        "no_fence": Edit(
            "atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);\n        last",
            "last",
            FaultKind.RACE_BETWEEN_THREADGROUPS,
            "float total",
        ),
        "fence_for_threadgroup_memory": Edit(
            "(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);\n        last",
            "(mem_flags::mem_threadgroup, memory_order_seq_cst, thread_scope_device);\n        last",
            FaultKind.RACE_BETWEEN_THREADGROUPS,
            "float total",
        ),
        "total_beyond_the_output": Edit(
            "partial[last] = total", "partial[last + 1] = total", FaultKind.OUT_OF_BOUNDS_WRITE, "partial[last + 1]"
        ),
        "last_is_read_too_early": Edit(BARRIER, "", FaultKind.RACE_IN_THREADGROUP, "if (last =="),
    },
    call={"init_value": 0},
)

ALGORITHMS = {
    "transpose": TRANSPOSE,
    "matmul": MATMUL,
    "softmax": SOFTMAX,
    "scan": SCAN,
    "histogram": HISTOGRAM,
    "layer_norm": LAYER_NORM,
    "bitonic_sort": BITONIC_SORT,
    "convolution": CONVOLUTION,
    "block_matmul": BLOCK_MATMUL,
    "dequantize": DEQUANTIZE,
    "embedding": EMBEDDING,
    "last_block": LAST_BLOCK,
}


def run(name: str, algorithm: Algorithm, source: str, **chosen: Any) -> np.ndarray:
    kernel = metal_kernel(name, list(algorithm.inputs), ["out"], source)
    with settings(metal_versions=chosen.pop("metal_versions", ()), **chosen):
        (out,) = kernel(
            inputs=[mx.array(value) for value in algorithm.inputs.values()],
            output_shapes=[algorithm.expected.shape],
            output_dtypes=[mx.uint32 if algorithm.expected.dtype == np.uint32 else mx.float32],
            grid=algorithm.grid,
            threadgroup=algorithm.threadgroup,
            **algorithm.call,
        )
    return np.array(out)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_is_accepted(name: str) -> None:
    algorithm = ALGORITHMS[name]
    out = run(name, algorithm, algorithm.source, metal_versions=((3, 2),))
    np.testing.assert_allclose(out, algorithm.expected, rtol=2e-3, atol=2e-3)


QUICK = 2  # edits of each algorithm; a nightly session tries all
EDITS = [
    pytest.param(name, edit, marks=[pytest.mark.slow] if number >= QUICK else [], id=f"{name}-{edit}")
    for name, algorithm in ALGORITHMS.items()
    for number, edit in enumerate(algorithm.edits)
]


@pytest.mark.parametrize(("name", "edit"), EDITS)
def test_edit_is_caught(name: str, edit: str) -> None:
    algorithm = ALGORITHMS[name]
    change = algorithm.edits[edit]
    assert change.old in algorithm.source
    source = algorithm.source.replace(change.old, change.new, 1)
    schedules = {} if change.kind is FaultKind.UNINITIALISED_VARIABLE else {"schedules": ()}
    with pytest.raises(KernelFault) as caught:
        run(name, algorithm, source, **schedules)
    found = [f for f in caught.value.findings if f.kind is change.kind]
    assert found, str(caught.value)
    if change.at:
        lines = source.splitlines()
        named = [lines[int(line) - 1] for f in found for line in re.findall(rf"{name}:(\d+)", f.message)]
        assert any(change.at in line for line in named), str(caught.value)
