"""Memory that is read before it is written, or never written: edits of right algorithms, each caught at its line."""

from metal_kernels.simulator import FaultKind

READ = FaultKind.UNINITIALISED_READ
VARIABLE = FaultKind.UNINITIALISED_VARIABLE
NEVER_WRITTEN = FaultKind.NEVER_WRITTEN

# By algorithm: what is replaced by what, the fault, and the line (by its text) that is named.
EDITS = {
    "transpose": {
        "no_guard_on_output": ("if (row_out < COLS && col_out < ROWS)", "", READ, "= tile[t.x]"),
    },
    "matmul": {
        "tile_without_zero_fill": (
            "left[ty][tx] = row < m && k + tx < depth ? a[row * depth + k + tx] : 0.0f",
            "if (row < m && k + tx < depth) left[ty][tx] = a[row * depth + k + tx]",
            READ,
            "sum = fma",
        ),
        "accumulates_in_the_output": ("out[row * n + col] = sum;", "out[row * n + col] += sum;", READ, "out[row * n"),
    },
    "softmax": {
        "tail_of_the_row_not_written": ("if (lid < WIDTH) out", "if (lid < WIDTH / 4 * 4) out", NEVER_WRITTEN),
    },
    "scan": {
        "reads_the_other_buffer": (
            "float v = buffer[from][lid];",
            "float v = buffer[1 - from][lid];",
            READ,
            "float v = buffer[1",
        ),
    },
    "histogram": {
        "bins_not_cleared": (
            "if (lid < 16) atomic_store_explicit(bins + lid, 0u, memory_order_relaxed);",
            "",
            READ,
            "&bins[value & 15]",
        ),
        "half_of_the_bins_cleared": (
            "if (lid < 16) atomic_store",
            "if (lid < 8) atomic_store",
            READ,
            "&bins[value & 15]",
        ),
    },
    "layer_norm": {
        "columns_skipped": ("c += 32)\n    out", "c += 64)\n    out", NEVER_WRITTEN),
    },
    "bitonic_sort": {
        "too_few_keys_loaded": ("keys[lid] = half(x[lid]);", "if (lid < 60) keys[lid] = half(x[lid]);", READ),
    },
    "convolution": {
        "halo_not_loaded": ("k < WIDTH + 2 * HALO; k += WIDTH", "k < WIDTH; k += WIDTH", READ, "sum += line"),
    },
    "block_matmul": {
        "a_block_is_missing": ("simdgroup_store(sum", "if (sg != 2) simdgroup_store(sum", NEVER_WRITTEN),
        "accumulator_not_initialised": ("sum(0);", "sum;", VARIABLE),
    },
    "dequantize": {
        "half_of_the_words_written": ("to[1] = high;", "", NEVER_WRITTEN),
        "high_nibbles_forgotten": (
            "high[k] = float(fma(half(word >> (16 + 4 * k) & 0xF), affine.x, affine.y));",
            "if (k) high[k] = low[k];",
            VARIABLE,
        ),
    },
}


def test_edit_is_caught(catch, algorithm, edit):
    catch(algorithm, *EDITS[algorithm][edit])
