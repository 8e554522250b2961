"""Accesses that nothing orders: edits of right algorithms, each caught at its line."""

from metal_kernels.simulator import FaultKind

INSIDE = FaultKind.RACE_IN_THREADGROUP
BETWEEN = FaultKind.RACE_BETWEEN_THREADGROUPS
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

# By algorithm: what is replaced by what, the fault, and the line (by its text) that is named.
EDITS = {
    "transpose": {
        "wrong_row_stride_of_output": ("out[row_out * ROWS", "out[row_out * COLS", BETWEEN, "= tile[t.x]"),
        "no_barrier": (BARRIER, "", INSIDE, "= tile[t.x]"),
        "barrier_for_device_memory": ("mem_threadgroup", "mem_device", INSIDE, "= tile[t.x]"),
    },
    "matmul": {
        "no_barrier_before_the_product": (BARRIER, "", INSIDE, "sum = fma"),
        "no_barrier_before_the_next_tile": (
            "threadgroup_barrier(mem_flags::mem_none | mem_flags::mem_threadgroup);",
            "",
            INSIDE,
            "left[ty][tx] = row < m",
        ),
        "column_guard_missing": ("if (row < m && col < n)", "if (row < m)", BETWEEN, "out[row * n"),
    },
    "softmax": {
        "scratch_reused_too_early": (BARRIER + "  // every thread has read", "", INSIDE, "if (simd_is_first())"),
        "all_lanes_write_the_scratch": (
            "if (lane == 0) shared[sg] = best;",
            "shared[sg] = v;",
            INSIDE,
            "shared[sg] = v;",
        ),
        "simdgroup_barrier_is_too_narrow": (
            BARRIER + "\nbest",
            "simdgroup_barrier(mem_flags::mem_threadgroup);\nbest",
            INSIDE,
            "best = max(shared[0]",
        ),
        "row_written_over_the_next": ("if (lid < WIDTH) out", "out", BETWEEN, "out[row * WIDTH"),
    },
    "scan": {
        "one_buffer": ("from = 1 - from;", "", INSIDE, "buffer[from][lid] = v;"),
        "no_barrier_in_the_loop": (BARRIER + "\n}", "}", INSIDE, "v += buffer[from][lid - step]"),
    },
    "histogram": {
        "plain_counts_in_the_threadgroup": (
            "atomic_fetch_add_explicit(&bins[value & 15], 1u, memory_order_relaxed);",
            "((threadgroup uint*)bins)[value & 15] += 1;",
            INSIDE,
            "((threadgroup uint*)bins)",
        ),
        "plain_counts_in_the_output": (
            "atomic_fetch_add_explicit(&counts[lid], count, memory_order_relaxed);",
            "out[lid] += count;",
            BETWEEN,
            "out[lid] += count",
        ),
    },
    "layer_norm": {
        "tree_without_barriers": (BARRIER + "\n    if", "if", INSIDE, "sums[lid] += sums"),
        "sums_read_too_early": (BARRIER + "  // the sums are whole", "", INSIDE, "float mean = sums[0]"),
        "one_row_for_all": ("out[threadgroup_position_in_grid.y * N + c]", "out[c]", BETWEEN, "out[c] = (row[c]"),
    },
    "bitonic_sort": {
        "no_barrier_between_the_stages": (BARRIER + "\n        ushort", "ushort", INSIDE, "half low = min"),
        "both_of_a_pair_exchange": ("if (other > lid)", "", INSIDE),
        "no_barrier_at_the_end": (BARRIER + "  // sorted", "", INSIDE, "out[lid] = keys"),
    },
    "convolution": {
        "no_barrier_after_loading": (BARRIER, "", INSIDE, "sum += line"),
    },
    "block_matmul": {
        "no_barrier_after_staging": (BARRIER, "", INSIDE, "simdgroup_load(p"),
        "blocks_overlap": ("+ row * 16 + col, 16);", "+ row * 16 + col / 2, 16);", INSIDE, "simdgroup_store"),
    },
    "dequantize": {
        "words_overlap": ("(device float4*)(out + i * 8);", "(device float4*)(out + i * 4);", INSIDE, "to["),
    },
    "embedding": {
        "dimensions_collide": ("uint to = (p.z * 3 + p.y)", "uint to = (p.z * 2 + p.y)", BETWEEN, "out[to] ="),
        "lanes_collide": ("* 16 + p.x;", "* 16 + p.x / 2;", INSIDE, "out[to] ="),
    },
    "last_block": {
        "no_fence": (
            "atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);\n    last",
            "last",
            BETWEEN,
            "float total",
        ),
        "fence_for_threadgroup_memory": (
            "(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);\n    last",
            "(mem_flags::mem_threadgroup, memory_order_seq_cst, thread_scope_device);\n    last",
            BETWEEN,
            "float total",
        ),
        "last_is_read_too_early": (BARRIER, "", INSIDE, "if (last =="),
    },
}


def test_edit_is_caught(catch, algorithm, edit):
    catch(algorithm, *EDITS[algorithm][edit])
