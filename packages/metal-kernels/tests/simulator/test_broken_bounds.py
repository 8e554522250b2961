"""Indices that leave a buffer or an array, and misaligned vectors: edits of right algorithms are caught."""

from metal_kernels.simulator import FaultKind

READ = FaultKind.OUT_OF_BOUNDS_READ
WRITE = FaultKind.OUT_OF_BOUNDS_WRITE
INDEX = FaultKind.ARRAY_INDEX
MISALIGNED = FaultKind.MISALIGNED

# By algorithm: what is replaced by what, the fault, and the line (by its text) that is named.
EDITS = {
    "transpose": {
        "no_guard_in_second_dimension": ("row < ROWS && col < COLS", "col < COLS", READ, "= a[row * COLS"),
        "guard_off_by_one": ("col < COLS)", "col <= COLS)", READ, "= a[row * COLS"),
        "column_beyond_the_tile": ("tile[t.x][t.y]", "tile[t.x + 1][t.y]", INDEX, "= tile[t.x + 1]"),
    },
    "matmul": {
        "depth_guard_missing": ("k + ty < depth && col < n ?", "col < n ?", READ, "b[(k + ty)"),
        "inner_loop_too_long": ("j < T", "j <= T", INDEX, "sum = fma"),
        "row_guard_missing": ("if (row < m && col < n)", "if (col < n)", WRITE, "out[row * n"),
    },
    "softmax": {
        "scratch_for_one_simdgroup": (
            "threadgroup float shared[SIMDS]",
            "threadgroup float shared[1]",
            INDEX,
            "shared[sg] = best",
        ),
        "all_lanes_read_the_scratch": (
            "lane < SIMDS ? shared[lane] : 0.0f",
            "((threadgroup float*)shared)[lane]",
            READ,
            "total = simd_sum(((",
        ),
        "tail_of_the_row_not_guarded": (
            "lid < WIDTH ? x[row * WIDTH + lid] : -INFINITY",
            "x[row * WIDTH + lid]",
            READ,
            "float v = x[",
        ),
    },
    "scan": {
        "reads_before_the_buffer": ("if (lid >= step) v", "v", INDEX, "v += buffer[from][lid - step]"),
    },
    "histogram": {
        "code_beyond_the_bins": ("value & 15", "value", INDEX, "&bins[value]"),
        "bins_beyond_the_last": ("if (lid < 16)\n", "if (lid < 17)\n", READ, "count = atomic"),
        "counts_beyond_the_output": ("if (lid < 16) atomic_fetch", "if (lid < 17) atomic_fetch", READ, "&counts[lid]"),
    },
    "layer_norm": {
        "tree_one_too_wide": ("uint half_size = 16", "uint half_size = 32", INDEX, "sums[lid] += sums"),
        "weight_of_the_next_column": ("* w[c]", "* w[c + 1]", READ, "* scale * w["),
        "row_of_the_next_threadgroup": (
            "x + threadgroup_position_in_grid.y * N",
            "x + (threadgroup_position_in_grid.y + 1) * N",
            READ,
            "own += float2(row[c]",
        ),
    },
    "bitonic_sort": {
        "more_results_than_room": ("lid < 10", "lid < 11", WRITE, "out[lid] = keys"),
        "last_key_beyond_the_end": ("keys[63 - lid]", "keys[64 - lid]", INDEX, "out[lid] = keys"),
    },
    "convolution": {
        "left_border_not_guarded": ("at >= 0 && at < n", "at < n", READ, "line[k] = at"),
        "right_border_not_guarded": ("at >= 0 && at < n", "at >= 0", READ, "line[k] = at"),
        "halo_has_no_room": ("line[WIDTH + 2 * HALO];", "line[WIDTH + HALO];", INDEX, "line[k] = at"),
        "one_tap_too_many": ("k < TAPS", "k <= TAPS", READ, "sum += line"),
        "output_not_guarded": ("if (first + lid < n) out", "out", WRITE, "out[first + lid]"),
    },
    "block_matmul": {
        "depth_too_long": ("k < 16; k += 8) {", "k < 24; k += 8) {", READ, "simdgroup_load("),
        "wrong_stride_of_output": ("row * 16 + col, 16);", "row * 16 + col, 32);", WRITE, "simdgroup_store"),
    },
    "dequantize": {
        "guard_lets_one_in": ("if (i >= uint", "if (i > uint", READ, "uint word = w[i]"),
        "group_of_the_wrong_size": ("scales[i / 4]", "scales[i / 3]", READ, "half2 affine"),
        "store_not_aligned": (
            "(device float4*)(out + i * 8);",
            "(device float4*)(out + i * 8 + (i & 1));",
            MISALIGNED,
            "to[0] = low",
        ),
    },
    "embedding": {
        "padding_id": ("id >= 0 && id < 6", "id < 6", READ, "out[to] ="),
        "unknown_id": ("id >= 0 && id < 6", "id >= 0", READ, "out[to] ="),
        "last_dimension_too_wide": ("ids[p.z * 3", "ids[p.z * 4", READ, "int id = ids"),
    },
    "last_block": {
        "total_beyond_the_output": ("partial[last] = total", "partial[last + 1] = total", WRITE, "partial[last + 1]"),
    },
}


def test_edit_is_caught(catch, algorithm, edit):
    catch(algorithm, *EDITS[algorithm][edit])
