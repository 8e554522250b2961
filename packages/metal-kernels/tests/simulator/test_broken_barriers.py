"""Barriers that not all threads reach: edits of right algorithms, each caught at its line."""

from metal_kernels.simulator import FaultKind

DIVERGENT = FaultKind.DIVERGENT_BARRIER
MISSING = FaultKind.MISSING_THREADS_AT_BARRIER
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

# By algorithm: what is replaced by what, the fault, and the line (by its text) that is named.
EDITS = {
    "matmul": {
        "rows_beyond_the_matrix_leave": ("float sum = 0;", "float sum = 0; if (row >= m) return;", MISSING),
        "barriers_in_a_branch": (BARRIER, "if (row < m) " + BARRIER, DIVERGENT, "if (row < m) threadgroup_barrier"),
    },
    "scan": {
        "lanes_leave_the_loop": ("step < 64;", "step <= lid;", MISSING, "threadgroup_barrier"),
    },
    "layer_norm": {
        "tree_with_barriers_in_the_branch": (
            BARRIER + "\n    if (lid < half_size) sums[lid] += sums[lid + half_size];",
            "if (lid < half_size) {\n    " + BARRIER + "\n    sums[lid] += sums[lid + half_size]; }",
            DIVERGENT,
        ),
    },
}


def test_edit_is_caught(catch, algorithm, edit):
    catch(algorithm, *EDITS[algorithm][edit])
