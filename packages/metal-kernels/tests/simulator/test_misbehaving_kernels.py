"""Kernels that compile and misbehave: each is caught, with its kind and line."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from metal_kernels.simulator import FaultKind, KernelFault, metal_kernel, settings

SIZE = 64  # two SIMD-groups


@dataclass
class Case:
    """A body over input ``x`` (64 floats 0, 1, …) and ``idx`` (64 integers), the fault, and the line it is on."""

    body: str
    kind: FaultKind
    line: int | None
    header: str = ""
    grid: int = SIZE
    threadgroup: int = SIZE
    call: dict[str, Any] = field(default_factory=dict)
    atomic: bool = False


PREFIX = (
    "uint i = thread_position_in_grid.x; uint lid = thread_position_in_threadgroup.x; "
    "uint lane = thread_index_in_simdgroup; uint sg = simdgroup_index_in_threadgroup; "
    "uint group = threadgroup_position_in_grid.x; (void)lid; (void)lane; (void)sg; (void)group;\n"
)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

CASES = {
    # Out of bounds: the body's first line is line 2
    "read_after_the_end": Case("out[i] = x[i + 1];", FaultKind.OUT_OF_BOUNDS_READ, 2),
    "read_before_the_start": Case("out[i] = x[int(i) - 1];", FaultKind.OUT_OF_BOUNDS_READ, 2),
    "write_after_the_end": Case("float v = x[i];\nout[i + 1] = v;", FaultKind.OUT_OF_BOUNDS_WRITE, 3),
    "write_far_away": Case("out[i * 10000000] = x[i];", FaultKind.OUT_OF_BOUNDS_WRITE, 2),
    "read_through_index": Case("out[i] = x[idx[i] * 2];", FaultKind.OUT_OF_BOUNDS_READ, 2),
    "vector_read_over_the_end": Case(
        "if (i < 16) {\nfloat4 v = *(const device float4*)(x + i * 4 + 4);\nout[i] = v.x; }",
        FaultKind.OUT_OF_BOUNDS_READ,
        3,
    ),
    "read_in_function": Case(
        "out[i] = get(x, i);",
        FaultKind.OUT_OF_BOUNDS_READ,
        2,
        "inline float get(const device float* p, uint i) {\n  return p[i + 64];\n}\n",
    ),
    "threadgroup_over_the_end": Case(
        "threadgroup float t[64];\nthreadgroup float* p = t;\np[lid + 1] = x[i];\nout[i] = p[lid + 1];",
        FaultKind.OUT_OF_BOUNDS_WRITE,
        4,
    ),
    "threadgroup_array_index": Case(
        "threadgroup float t[64];\nt[lid + 1] = x[i];\nout[i] = t[lid + 1];", FaultKind.ARRAY_INDEX, 3
    ),
    "private_array_index": Case("float v[4] = {0, 1, 2, 3};\nout[i] = v[i % 5];", FaultKind.ARRAY_INDEX, 3),
    "missing_grid_guard": Case("out[i] = x[i];", FaultKind.OUT_OF_BOUNDS_READ, 2, grid=SIZE + 1),
    # Races inside a threadgroup
    "missing_barrier": Case(
        "threadgroup float t[64];\nt[lid] = x[i];\nfloat u = t[lid];\nout[i] = u + t[63 - lid];",
        FaultKind.RACE_IN_THREADGROUP,
        5,
    ),
    "barrier_without_flags": Case(
        "threadgroup float t[64];\nt[lid] = x[i];\nthreadgroup_barrier(mem_flags::mem_none);\nout[i] = t[63 - lid];",
        FaultKind.RACE_IN_THREADGROUP,
        5,
    ),
    "barrier_for_other_memory": Case(
        "threadgroup float t[64];\nt[lid] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nout[i] = t[63 - lid];",
        FaultKind.RACE_IN_THREADGROUP,
        5,
    ),
    "device_barrier_missing": Case(
        f"out[i] = x[i];\n{BARRIER}\nfloat v = out[63 - lid];\nif (v < 0) out[i] = v;",
        FaultKind.RACE_IN_THREADGROUP,
        4,
    ),
    "simdgroup_barrier_across_simdgroups": Case(
        "threadgroup float t[64];\nt[lid] = x[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "out[i] = t[63 - lid];",
        FaultKind.RACE_IN_THREADGROUP,
        5,
    ),
    "lanes_exchange_without_barrier": Case(
        "threadgroup float t[64];\nt[lid] = x[i];\nout[i] = t[lid ^ 1];", FaultKind.RACE_IN_THREADGROUP, 4
    ),
    "collective_is_no_barrier": Case(
        "threadgroup float t[64];\nt[lid] = x[i];\nfloat s = simd_sum(x[i]);\nout[i] = s + t[lid ^ 1];",
        FaultKind.RACE_IN_THREADGROUP,
        5,
    ),
    "missing_barrier_before_reuse": Case(
        f"threadgroup float t[64];\nt[lid] = x[i];\n{BARRIER}\n"
        f"float v = t[63 - lid];\nt[lid] = v;\n{BARRIER}\nout[i] = t[lid];",
        FaultKind.RACE_IN_THREADGROUP,
        6,
    ),
    "all_threads_write_one_place": Case(
        f"threadgroup float t[1];\nt[0] = x[i];\n{BARRIER}\nout[i] = t[0];", FaultKind.RACE_IN_THREADGROUP, 3
    ),
    "reduction_tree_without_barrier": Case(
        "threadgroup float t[64];\nt[lid] = x[i];\n"
        f"{BARRIER}\nfor (uint s = 32; s > 0; s /= 2) {{\n  "
        f"if (lid < s) t[lid] += t[lid + s];\n}}\n{BARRIER}\nout[i] = t[0];",
        FaultKind.RACE_IN_THREADGROUP,
        6,
    ),
    # Races between threadgroups
    "threadgroups_write_one_place": Case(
        "out[lid] = x[i];\nout[i] = 1;", FaultKind.RACE_BETWEEN_THREADGROUPS, None, threadgroup=32
    ),
    "threadgroup_reads_anothers_output": Case(
        "out[i] = x[i];\nfloat v = out[(i + 32) % 64];\nif (v < 0) out[i] = v;",
        FaultKind.RACE_BETWEEN_THREADGROUPS,
        None,
        threadgroup=32,
        call={"init_value": 0},
    ),
    "plain_counter": Case(
        "out[i] = x[i];\nif (lid == 0) count[0] += 1;",
        FaultKind.RACE_BETWEEN_THREADGROUPS,
        3,
        threadgroup=32,
        call={"init_value": 0},
    ),
    "atomic_and_plain": Case(
        "float v = *(const device int*)count;\natomic_fetch_add_explicit(&count[0], 1, memory_order_relaxed);\n"
        "atomic_store_explicit(&out[i], v, memory_order_relaxed);",
        FaultKind.RACE_IN_THREADGROUP,
        3,
        call={"init_value": 0},
        atomic=True,
    ),
    # Barriers
    "barrier_in_branch": Case(
        f"out[i] = x[i];\nif (lid < 32) {{\n  {BARRIER}\n}} else {{\n  {BARRIER}\n}}", FaultKind.DIVERGENT_BARRIER, 4
    ),
    "barrier_after_return": Case(
        f"out[i] = x[i];\nif (lid >= 40) return;\n{BARRIER}", FaultKind.MISSING_THREADS_AT_BARRIER, 4
    ),
    "barrier_in_uneven_loop": Case(
        f"out[i] = x[i];\nfor (uint k = 0; k < 1 + lid % 2; k++) {{\n  {BARRIER}\n}}",
        FaultKind.MISSING_THREADS_AT_BARRIER,
        4,
    ),
    # Memory that holds nothing
    "uninitialised_threadgroup_memory": Case(
        "threadgroup float t[64];\nif (lid < 63) t[lid] = x[i];\nout[i] = t[lid];", FaultKind.UNINITIALISED_READ, 4
    ),
    "output_read_before_written": Case("out[i] += x[i];", FaultKind.UNINITIALISED_READ, 2),
    "uninitialised_private_array": Case(
        "float v[4];\nfor (uint k = 0; k < 3; k++) v[k] = x[i];\nout[i] = v[i % 4];",
        FaultKind.UNINITIALISED_VARIABLE,
        None,
    ),
    "uninitialised_matrix": Case(
        "simdgroup_matrix<float, 8, 8> a, b, c;\nsimdgroup_load(a, x, 8);\nsimdgroup_load(b, x, 8);\n"
        "simdgroup_multiply_accumulate(c, a, b, c);\nif (sg == 0) simdgroup_store(c, out, 8);",
        FaultKind.UNINITIALISED_VARIABLE,
        None,
    ),
    "output_never_written": Case("if (i != 7) out[i] = x[i];", FaultKind.NEVER_WRITTEN, None),
    "second_output_never_written": Case("out[i] = x[i];", FaultKind.NEVER_WRITTEN, None, call={"write_count": False}),
    "grid_too_small": Case("out[i] = x[i];", FaultKind.NEVER_WRITTEN, None, grid=SIZE - 4),
    "atomic_on_uninitialised_memory": Case(
        f"threadgroup atomic_uint n;\natomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);\n{BARRIER}\n"
        "out[i] = atomic_load_explicit(&n, memory_order_relaxed);",
        FaultKind.UNINITIALISED_READ,
        3,
    ),
    # Alignment
    "misaligned_vector": Case(
        "if (i < 8) {\n  float4 v = *(const device float4*)(x + i * 4 + 1);\n  "
        "out[i] = v.x;\n} else {\n  out[i] = 0;\n}",
        FaultKind.MISALIGNED,
        3,
    ),
    "misaligned_vector_write": Case(
        "out[i] = x[i];\nif (i == 0) *(device float2*)(out + 1) = float2(x[1], x[2]);", FaultKind.MISALIGNED, 3
    ),
    # Limits
    "too_much_threadgroup_memory": Case(
        "threadgroup float t[8193];\nt[lid] = x[i];\nout[i] = t[lid];", FaultKind.THREADGROUP_MEMORY, None
    ),
    "too_much_in_two_variables": Case(
        "threadgroup float t[8000];\nthreadgroup float u[500];\nt[lid] = x[i];\nu[lid] = x[i];\n"
        "out[i] = t[lid] + u[lid];",
        FaultKind.THREADGROUP_MEMORY,
        None,
    ),
    "too_many_threads": Case(
        "if (i < 64) out[i] = x[i];", FaultKind.TOO_MANY_THREADS, None, grid=2048, threadgroup=1025
    ),
    "more_threads_than_declared": Case(
        "out[i] = x[i];", FaultKind.TOO_MANY_THREADS, None, "[[max_total_threads_per_threadgroup(32)]]"
    ),
    # Control and arithmetic
    "division_by_zero": Case("out[i] = x[i] + int(i) / idx[0];", FaultKind.DIVISION_BY_ZERO, 2),
    "too_much_private_memory": Case(
        "float v[200000];\nfor (uint k = 0; k < 200000; k++) v[k] = x[k % 64];\nout[i] = v[i * 100];",
        FaultKind.CRASH,
        None,
    ),
    "endless_loop": Case("uint k = i;\nwhile (x[k % 64] >= 0) {\n  k++;\n}\nout[i] = k;", FaultKind.ENDLESS, None),
    "endless_loop_without_an_access": Case("out[i] = x[i];\nwhile (true) {}", FaultKind.ENDLESS, 3),
}


def run(case: Case, **chosen: Any) -> None:
    call = dict(case.call)
    write_count = call.pop("write_count", True) and "init_value" not in call
    count = "if (i == 0) count[0] = 0;\n" if write_count else ""
    kernel = metal_kernel(
        "k",
        ["x", "idx"],
        ["out", "count"],
        # After the body's lines, so that they keep their numbers; nothing may follow a return.
        PREFIX + (count.rstrip() + " " + case.body if count else case.body),
        header=case.header,
        atomic_outputs=case.atomic,
    )
    with settings(metal_versions=((3, 2),), **chosen):
        kernel(
            inputs=[mx.arange(SIZE).astype(mx.float32), mx.arange(SIZE)],
            output_shapes=[(SIZE,), (1,)],
            output_dtypes=[mx.float32, mx.int32],
            grid=(case.grid, 1, 1),
            threadgroup=(case.threadgroup, 1, 1),
            **call,
        )


FOUND_BY_COMPARISON = (FaultKind.UNINITIALISED_VARIABLE, FaultKind.SCHEDULE_DEPENDENT)


@pytest.mark.parametrize("name", CASES)
def test_fault_is_found(name: str) -> None:
    case = CASES[name]
    schedules = {} if case.kind in FOUND_BY_COMPARISON else {"schedules": ()}
    with pytest.raises(KernelFault) as caught:
        run(case, **schedules)
    found = [f for f in caught.value.findings if f.kind is case.kind]
    assert found, str(caught.value)
    if case.line is not None:
        places = [f.place for f in found]
        expected = ("k.header" if "return p[i + 64]" in case.header else "k", case.line)
        assert expected in [(p.file, p.line) for p in places if p], str(caught.value)


def test_message_shows_the_line() -> None:
    with pytest.raises(
        KernelFault, match=r"k:2: out-of-bounds read: 4 bytes at byte 256 of 'x'(.|\n)*out\[i\] = x\[i \+ 1\]"
    ):
        run(CASES["read_after_the_end"], schedules=())


@pytest.mark.parametrize("name", ["missing_barrier", "all_threads_write_one_place", "reduction_tree_without_barrier"])
def test_schedules_alone_expose_races(name: str) -> None:
    with pytest.raises(KernelFault) as caught:
        run(CASES[name], checked=False)
    assert caught.value.findings[0].kind is FaultKind.SCHEDULE_DEPENDENT


def test_unchecked_run_survives_a_wild_access() -> None:
    with pytest.raises(KernelFault, match="memory that does not exist"):
        run(CASES["write_far_away"], checked=False)


def test_unwritten_outputs_can_be_allowed() -> None:
    run(CASES["output_never_written"], allow_unwritten=True)
