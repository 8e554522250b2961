"""Simulated kernels compute what the GPU would, from legal but unusual code too."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import simulator
from metal_kernels.simulator import KernelCompileError, Schedule, SimulatorError, metal_kernel, settings

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
PREFIX = (
    "uint i = thread_position_in_grid.x; uint lid = thread_position_in_threadgroup.x; "
    "uint lane = thread_index_in_simdgroup; uint sg = simdgroup_index_in_threadgroup;\n"
)


def run(body, size=64, threadgroup=64, dtype=mx.float32, header="", inputs=None, **call):
    """The output of a body over ``x`` = 0, 1, …"""
    inputs = {"x": mx.arange(size).astype(dtype)} if inputs is None else inputs
    kernel = metal_kernel(
        "k", list(inputs), ["out"], PREFIX + body, header=header, atomic_outputs=call.pop("atomic", False)
    )
    arguments = {
        "inputs": list(inputs.values()),
        "output_shapes": [(size,)],
        "output_dtypes": [dtype],
        "grid": (size, 1, 1),
        "threadgroup": (threadgroup, 1, 1),
        **call,
    }
    with settings(metal_versions=((3, 2),)):
        return np.array(kernel(**arguments)[0].astype(mx.float32))


X = np.arange(64, dtype=np.float32)

LEGAL = {
    "simd_sum": ("out[i] = simd_sum(x[i]);", X.reshape(2, 32).sum(1).repeat(32)),
    "divergent_simd_sum": (
        "out[i] = 0; if (lane < 4) out[i] = simd_sum(x[i]);",
        np.where(X % 32 < 4, np.where(X < 32, 6, 6 + 4 * 32), 0),
    ),
    "collective_in_uneven_loop": (
        "float s = 0; for (uint k = 0; k <= lane; k++) s += simd_sum(1.0f); out[i] = s;",
        np.array([sum(32 - k for k in range(lane + 1)) for lane in range(32)] * 2),
    ),
    "shuffles": (
        "out[i] = simd_shuffle_xor(x[i], 1) + simd_shuffle_down(x[i], 32 - lane == 1 ? 0 : 1) * 0;",
        X.astype(int) ^ 1,
    ),
    "broadcast": ("out[i] = simd_broadcast(x[i], 3);", np.where(X < 32, 3, 35)),
    "prefix_sum": (
        "out[i] = simd_prefix_inclusive_sum(x[i]);",
        np.cumsum(X.reshape(2, 32), 1).ravel(),
    ),
    "ballot": (
        "out[i] = popcount(uint((simd_vote::vote_t)simd_ballot(x[i] >= 30)));",
        np.where(X < 32, 2, 32),
    ),
    "quad_sum": ("out[i] = quad_sum(x[i]);", X.reshape(16, 4).sum(1).repeat(4)),
    "exchange_through_simdgroup_barrier": (
        "threadgroup float t[64]; t[lid] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = t[lid ^ 1];",
        X.astype(int) ^ 1,
    ),
    "two_declarators": (
        f"threadgroup float t[64], u[64]; t[lid] = x[i]; u[63 - lid] = x[i]; {BARRIER} out[i] = t[lid] + u[lid];",
        np.full(64, 63.0),
    ),
    "threadgroup_scalar": (f"threadgroup float t; if (lid == 5) t = x[i]; {BARRIER} out[i] = t;", np.full(64, 5.0)),
    "threadgroup_struct": (
        f"threadgroup Pair t[64]; t[lid].a = x[i]; t[lid].b = 1; {BARRIER} out[i] = t[63 - lid].a + t[63 - lid].b;",
        64 - X,
        "struct Pair { float a; float b; };\n",
    ),
    "barrier_in_uniform_branch": (
        f"threadgroup float t[64]; t[lid] = x[i]; if (threadgroups_per_grid.x) {{ {BARRIER} }} out[i] = t[63 - lid];",
        63 - X,
    ),
    "barrier_in_loop": (
        f"threadgroup float t[64]; float s = 0; for (int k = 0; k < 3; k++) {{ t[lid] = x[i] + k; {BARRIER} "
        f"s += t[63 - lid]; {BARRIER} }} out[i] = s;",
        3 * (63 - X) + 3,
    ),
    "reads_of_one_word_by_all": (
        f"threadgroup float t[1]; if (lid == 0) t[0] = x[0] + 2; {BARRIER} out[i] = t[0];",
        np.full(64, 2.0),
    ),
    "vector_accesses": (
        "if (i < 16) *(device float4*)(out + i * 4) = *(const device float4*)(x + i * 4) * 2.0f;",
        X * 2,
    ),
    "vector_constructors": (
        "float4 v = float4(float2(x[i], 1), 2, 3); float2 w(v.z, v.w); v.xy = v.yx; out[i] = v.x + v.y + w.x + w.y;",
        X + 6,
    ),
    "vector_conversions": (
        "int4 n = int4(1, 2, 3, 4); float4 v = float4(n) + (float4)x[i]; uchar2 b = uchar2(3, 4); out[i] = v.w + b.y;",
        X + 8,
    ),
    "reinterpreted_bits": ("out[i] = as_type<float>(as_type<uint>(x[i]));", X),
    "half_rounds": (
        "out[i] = float(half(x[i]) * half(0.1h));",
        (X.astype(np.float16) * np.float16(0.1)).astype(np.float32),
    ),
    "bfloat_rounds": ("out[i] = float(bfloat(x[i] + 1) + bfloat(0.001f));", X + 1),
    "bfloat_literal": ("out[i] = x[i] + float(1.5bf);", X + 1.5),
    "ternary_chain": ("out[i] = i < 2 ? 1.0f : i < 4 ? 2.0f : 3.0f;", np.where(X < 2, 1, np.where(X < 4, 2, 3))),
    "private_array": ("float v[4] = {0}; for (int k = 0; k < 4; k++) v[k] = x[i] * k; out[i] = v[3];", X * 3),
    "opencl_words_as_names": ("float local = x[i], global = 1; out[i] = local + global;", X + 1),
    "early_return": ("if (i >= 32) { out[i] = 0; return; } out[i] = simd_sum(1.0f);", np.where(X < 32, 32, 0)),
    "precise_and_fast": ("out[i] = metal::precise::exp(0.0f * x[i]) + metal::fast::exp2(1.0f);", np.full(64, 3.0)),
    "struct_methods": (
        "Scale s{2.0f}; out[i] = s(x[i]);",
        X * 2,
        "struct Scale { float f; float operator()(float v) const { return f * v; } };\n",
    ),
    "template_function": (
        "out[i] = twice<float, 2>(x[i]);",
        X * 2,
        "template <typename T, int N> inline T twice(T v) { return v * T(N); }\n",
    ),
    "constant_table": (
        "out[i] = table[i % 4];",
        np.tile([1.0, 2.0, 4.0, 8.0], 16),
        "constant float table[4] = {1, 2, 4, 8};\n",
    ),
    "macro": ("out[i] = TWICE(x[i]);", X * 2, "#define TWICE(v) ((v) * 2)\n"),
    "unrolled_loop": (
        "float s = 0;\n#pragma clang loop unroll(full)\nfor (int k = 0; k < 4; k++) s += k;\nout[i] = s + x[i];",
        X + 6,
    ),
    "matrix_product": (
        "simdgroup_matrix<float, 8, 8> a, b, c = simdgroup_matrix<float, 8, 8>(0); simdgroup_load(a, x, 8); "
        "simdgroup_load(b, x, 8, ulong2(0, 0), true); simdgroup_multiply_accumulate(c, a, b, c); "
        "if (sg == 0) simdgroup_store(c, out, 8);",
        (X.reshape(8, 8) @ X.reshape(8, 8).T).ravel(),
    ),
    "vectors_of_bool": (
        "bool4 big = float4(x[i]) > float4(3); bool2 two = vec<bool, 2>(true, false); "
        "out[i] = any(big) && all(!(big && bool4(two.y))) ? float4(big).w + two.x : 0;",
        np.where(X > 3, 2, 0),
    ),
    "vector_of_bool_in_a_union": (
        "Bits u; u.b = {true, false, true, false}; u.b[1] = true; out[i] = u.i == 0x00010101u;",
        np.ones(64),
        "union Bits { bool4 b; uint i; };\n",
    ),
    "scalars_among_vectors": (
        "float4 v = clamp(max(float4(x[i]), 3.0f), 0.0f, 5.0f); v = select(v, float4(0), v > 4.5f); "
        "out[i] = v.y + min(2, int2(7)).x + mix(float2(0), float2(1), 0.5f).x;",
        np.where(X > 4, 0, np.maximum(X, 3)) + 2.5,
    ),
    "packed_vectors": (
        "packed_float3 p = packed_float3(1, 2, x[i]); p.x += 1; p *= 2.0f; out[i] = (p + float3(1)).z + p.x + p[1];",
        2 * X + 1 + 4 + 4,
    ),
    "packed_and_unpacked_words": (
        "uint word = pack_float_to_unorm4x8(float4(1, 0, 0, 1)); "
        "out[i] = word == 0xFF0000FFu ? unpack_snorm2x16_to_float(0x7FFFu).x : 0;",
        np.ones(64),
    ),
    "small_matrices": (
        "float2x3 m = float2x3(float3(1, 2, 3), float3(4, 5, 6)); m[1] *= 2.0f; "
        "out[i] = (m * float2(1, x[i])).z + (transpose(m) * m)[0][0] + determinant(float3x3(2.0f));",
        3 + 12 * X + 14 + 8,
    ),
    "alignment_of_threadgroup_memory": (
        f"threadgroup char c[3]; threadgroup alignas(16) float t[64]; c[lid % 3] = 1; t[lid] = x[i]; {BARRIER} "
        "out[i] = ((threadgroup float4*)t)[lid / 4][3 - lid % 4] + c[2];",
        X.reshape(16, 4)[:, ::-1].ravel() + 1,
    ),
    "structs_in_constant_memory": (
        "Pair p = table[i % 2]; Pair q; q = p; q += p; out[i] = q.b;",
        np.where(X % 2, 8, 4),
        "struct Pair { float a, b; thread Pair& operator+=(Pair o) { b += o.b; return *this; } };\n"
        "constant Pair table[2] = {{1, 2}, {3, 4}};\n",
    ),
    "copies_out_of_constant_memory": (
        "Outer o; o = table[1]; Inner n; n = o.inner; n = table[i % 2].inner; Pair<float> p = pairs[1]; p = pairs[0]; "
        "Bits b = bits[0]; Unnamed u; u = unnamed[0]; Outer c = i > 3 ? table[0] : table[1]; Outer none = {}; "
        f"threadgroup Inner t[1]; if (lid == 0) t[0] = table[0].inner; {BARRIER} "
        "out[i] = first(table[1]) + at(0).v.y + n.a + p.b + b.f + u.p[1] + c.x + t[0].b + none.x + o.many[2];",
        10 + 3 + np.where(X % 2, 7, 1) + 2 + 1 + 5 + np.where(X > 3, 1, 10) + 2 + 6,
        "struct Inner { float a; int b; };\n"
        "template <typename T> struct Pair { T a, b; };\n"
        "union Bits { uint u; float f; };\n"
        "typedef struct { packed_float3 p; bool2 flags; } Unnamed;\n"
        "struct Outer { float x; float4 v; Inner inner; metal::array<int, 3> many; };\n"
        "constant Outer table[2] = {{1, float4(2, 3, 4, 5), {1, 2}}, {10, float4(0), {7, 8}, {4, 5, 6}}};\n"
        "constant Pair<float> pairs[2] = {{1, 2}, {3, 4}};\n"
        "constant Bits bits[1] = {{0x3f800000u}};\n"
        "constant Unnamed unnamed[1] = {{packed_float3(4, 5, 6)}};\n"
        "inline float first(Outer o) { return o.x; }\n"
        "inline Outer at(int i) { return table[i]; }\n",
    ),
    "struct_with_its_own_constructor": (
        "Scale s = Scale(2.0f); Scale t = s; t = Scale(3.0f); out[i] = s.f * x[i] + t.f;",
        2 * X + 3,
        "struct Scale { float f; Scale(float v) thread : f(v) {} Scale(const thread Scale& o) : f(o.f) {} };\n",
    ),
    "integer_functions_of_vectors": (
        "uint2 v = clz(uint2(i + 1)) + ctz(uint2(8)) + extract_bits(uint2(i), 1u, 3u) "
        "+ mulhi(uint2(1u << 31), uint2(4)) + rotate(uint2(1), uint2(3)) "
        "+ reverse_bits(uint2(1u << 31)) + absdiff(uint2(1), uint2(4)); out[i] = v.y;",
        31 - np.floor(np.log2(X + 1)) + 3 + (X.astype(int) >> 1 & 7) + 2 + 8 + 1 + 3,
    ),
    "classes_of_lanes": (
        "out[i] = all(isfinite(float2(x[i]))) + any(signbit(half2(-1))) + isunordered(x[i], NAN) "
        "+ all(isnormal(float2(1)));",
        np.full(64, 4.0),
    ),
    "counts_of_zero_bits": (
        "out[i] = clz(i + 1) + clz(ulong(1)) + clz(uchar(i)) * (i == 1) + ctz(ushort(8)) + ctz(0) + popcount(-1L);",
        31 - np.floor(np.log2(X + 1)) + 63 + 7 * (X == 1) + 3 + 32 + 64,
    ),
    "braces_for_structs": (
        "Pair p, q({3, 4}); p = {x[i], 1}; threadgroup Pair t[64]; t[lid] = {x[i], 2}; Hidden h; h.set(5); "
        f"{BARRIER} out[i] = p.a + q.b + t[63 - lid].a + first({{7, 8}}) + h.get();",
        63.0 + np.full(64, 4 + 7 + 5),
        "struct Pair { float a, b; };\ninline float first(Pair p) { return p.a; }\n"
        "class Hidden { int n; public: void set(int v) { n = v; } int get() const { return n; } };\n",
    ),
    "builtins_that_mlx_uses_too": ("constexpr short log = __builtin_ctz(8); out[i] = log;", np.full(64, 3.0)),
    "quads": (
        "uint votes = (quad_vote::vote_t)quad_ballot(lane % 4 == 1); "
        "out[i] = quad_prefix_inclusive_sum(1.0f) + quad_all(true) + 10 * votes;",
        X % 4 + 2 + 20,
    ),
    "nested_brackets": ("int at[2] = {1, 0}; out[i] = x[i + at[at[0]]];", X),
    "one_value_written_by_all": (f"threadgroup float t; t = simd_sum(1.0f); {BARRIER} out[i] = t;", np.full(64, 32.0)),
    "write_after_read_behind_a_bare_barrier": (
        f"threadgroup float t[64]; t[lid] = x[i]; {BARRIER} float v = t[63 - lid]; "
        "threadgroup_barrier(mem_flags::mem_none); t[lid] = v; out[i] = t[lid];",
        63 - X,
    ),
    "matrix_elements": (
        "simdgroup_float8x8 a; simdgroup_load(a, x, 8); a.thread_elements()[0] += 1; "
        "if (sg == 0) simdgroup_store(a, out, 8);",
        X + (X % 2 == 0),
    ),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_kernel(name):
    body, expected, *header = LEGAL[name]
    np.testing.assert_allclose(run(body, header="".join(header)), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", ["safe", "fast"])
def test_math_mode_is_visible(mode):
    kernel = metal_kernel(
        "k",
        ["x"],
        ["out"],
        "#ifdef __FAST_MATH__\nout[0] = 1;\n#else\nout[0] = 0;\n#endif",
        compile_options={"math_mode": mode},
    )
    call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    (out,) = kernel(inputs=[0], output_shapes=[(1,)], output_dtypes=[mx.int32], **call)
    assert out.item() == (mode == "fast")


def test_complex_numbers_in_constant_memory():
    z = mx.array([1 + 2j, 3 - 1j])
    kernel = metal_kernel("k", ["z"], ["out"], "complex64_t a = z[0]; complex64_t b; b = z[1]; out[0] = a * b;")
    call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    (out,) = kernel(inputs=[z], output_shapes=[(1,)], output_dtypes=[mx.complex64], **call)
    assert out.item() == 5 + 5j


def test_ragged_grid_and_small_threadgroups():
    assert (
        run("out[i] = simd_sum(1.0f) + threads_per_threadgroup.x;", size=70, threadgroup=40)[[0, 39, 40, 69]]
        == [72, 48, 60, 60]
    ).all()


def test_three_dimensions():
    kernel = metal_kernel(
        "cube",
        [],
        ["out"],
        "uint3 p = thread_position_in_grid; uint3 n = threads_per_grid;\n"
        "out[(p.z * n.y + p.y) * n.x + p.x] = p.x + 10 * p.y + 100 * p.z;",
    )
    (out,) = kernel(
        inputs=[], output_shapes=[(3, 5, 7)], output_dtypes=[mx.int32], grid=(7, 5, 3), threadgroup=(4, 2, 2)
    )
    z, y, x = np.mgrid[:3, :5, :7]
    assert (np.array(out) == x + 10 * y + 100 * z).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.int8, mx.uint32])
def test_dtypes(dtype):
    assert (run("out[i] = x[i] + T(1);", dtype=dtype, template=[("T", dtype)]) == X + 1).all()


def test_template_values():
    template = [("T", mx.float32), ("N", 3), ("FLAG", True)]
    assert (run("out[i] = FLAG ? x[i] * T(N) : 0;", template=template) == X * 3).all()


def test_scalars_shapes_and_strides():
    inputs = {"a": mx.arange(128).reshape(64, 2), "s": 2.5}
    body = "out[i] = a[i * a_strides[0]] * s + a_shape[0] + a_ndim;"
    np.testing.assert_allclose(run(body, inputs=inputs), X * 2 * 2.5 + 66)


def test_strided_input_is_passed_as_it_is():
    kernel = metal_kernel(
        "k",
        ["a"],
        ["out"],
        "uint i = thread_position_in_grid.x; out[i] = a[i * a_strides[0]];",
        ensure_row_contiguous=False,
    )
    (out,) = kernel(
        inputs=[mx.arange(20)[::2]],
        output_shapes=[(10,)],
        output_dtypes=[mx.int32],
        grid=(10, 1, 1),
        threadgroup=(10, 1, 1),
    )
    assert out.tolist() == list(range(0, 20, 2))


def test_small_input_is_in_constant_memory():
    header = "inline float first(const device float* p) { return p[0]; }\n"
    assert (run("out[i] = first(a);", header=header, inputs={"a": mx.ones(8)}) == 1).all()
    with pytest.raises(KernelCompileError, match="no matching function"):
        run("out[i] = first(a);", header=header, inputs={"a": mx.ones(7)})


def test_atomic_sum_over_threadgroups():
    body = "atomic_fetch_add_explicit(&out[i % 4], x[i], memory_order_relaxed);"
    out = run(body, threadgroup=16, atomic=True, init_value=0)
    np.testing.assert_allclose(out[:4], X.reshape(16, 4).sum(0))
    assert (out[4:] == 0).all()


def test_empty_output():
    kernel = metal_kernel("k", ["x"], ["out"], "out[thread_position_in_grid.x] = x[0];")
    (out,) = kernel(
        inputs=[mx.zeros(9)], output_shapes=[(0,)], output_dtypes=[mx.float32], grid=(0, 1, 1), threadgroup=(1, 1, 1)
    )
    assert out.shape == (0,)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_input_changed_in_place_changes_the_callers_array(dtype):
    cache = mx.zeros((4, 16), dtype)
    mx.eval(cache)
    body = "device T* row = const_cast<device T*>(cache);\nrow[16 * 2 + i] += x[i];\nif (i == 0) out[0] = 0;"
    kernel = metal_kernel("write", ["cache", "x"], ["out"], "uint i = thread_position_in_grid.x;" + body)
    for _ in range(2):
        kernel(
            inputs=[cache, mx.arange(16).astype(dtype)],
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
            grid=(16, 1, 1),
            threadgroup=(16, 1, 1),
            template=[("T", dtype)],
        )
    expected = np.zeros((4, 16))
    expected[2] = 2 * np.arange(16)
    assert (np.array(cache.astype(mx.float32)) == expected).all()


def test_inputs_that_share_memory_stay_shared():
    base = mx.zeros((64,))
    mx.eval(base)
    view = base[:32]
    body = "const_cast<device float*>(whole)[i] = 1;\nif (i == 0) out[0] = 0;"
    kernel = metal_kernel(
        "share", ["whole", "part"], ["out"], "uint i = thread_position_in_grid.x; (void)part;" + body
    )
    kernel(
        inputs=[base, view], output_shapes=[(1,)], output_dtypes=[mx.int32], grid=(64, 1, 1), threadgroup=(64, 1, 1)
    )
    assert base.sum().item() == 64
    assert view.sum().item() == 32


def test_schedules_agree_or_the_call_fails():
    with settings(schedules=(Schedule.SHUFFLED,), seed=7):
        assert (run("out[i] = x[i];") == X).all()


def test_wrong_number_of_inputs():
    kernel = metal_kernel("k", ["x"], ["out"], "out[0] = x[0];")
    with pytest.raises(SimulatorError, match="expected 1 inputs, got 2"):
        kernel(inputs=[1, 2], output_shapes=[(1,)], output_dtypes=[mx.float32], grid=(1, 1, 1), threadgroup=(1, 1, 1))


def test_what_was_installed_before_a_block_remains(request):
    before = simulator.is_installed()
    simulator.install()
    if not before:
        request.addfinalizer(simulator.uninstall)
    pretended = mx.metal.is_available()
    with simulator.installed(pretend_metal=True):
        assert mx.metal.is_available()
    assert simulator.is_installed()
    assert mx.metal.is_available() == pretended


def _compiles() -> bool:
    """Whether ``mx.compile`` compiles: a compiled function is traced once and not run again."""
    calls = []
    function = mx.compile(lambda x: calls.append(x) or x + 1)
    mx.eval(function(mx.zeros(1)), function(mx.zeros(1)))
    return len(calls) == 1


def test_traced_inputs_are_refused():
    def call(x):
        kernel = metal_kernel("k", ["x"], ["out"], "out[thread_position_in_grid.x] = x[0];")
        return kernel(
            inputs=[x], output_shapes=[(1,)], output_dtypes=[mx.float32], grid=(1, 1, 1), threadgroup=(1, 1, 1)
        )

    # The pytest plugin of this run may have switched compilation off.
    was_disabled = not _compiles()
    mx.enable_compile()
    try:
        with pytest.raises(SimulatorError, match="disable_compile"):
            mx.compile(call)(mx.zeros(9))
    finally:
        if was_disabled:
            mx.disable_compile()


def test_name_that_is_no_identifier():
    kernel = metal_kernel("step_0.5", ["x"], ["out"], "out[0] = x[0];")
    with pytest.raises(KernelCompileError, match=r"letters, digits and '_', got 'step_0\.5'"):
        kernel(inputs=[1], output_shapes=[(1,)], output_dtypes=[mx.int32], grid=(1, 1, 1), threadgroup=(1, 1, 1))


def test_empty_threadgroup():
    with pytest.raises(SimulatorError, match="at least one thread"):
        run("out[i] = x[i];", threadgroup=0)


def test_settings_must_run_something():
    with pytest.raises(SimulatorError, match="Choose one"), settings(checked=False, schedules=()):
        pass


def test_verbose_prints_the_source(capsys):
    run("out[i] = x[i];", verbose=True)
    assert "[[kernel]] void custom_kernel_k" in capsys.readouterr().out
