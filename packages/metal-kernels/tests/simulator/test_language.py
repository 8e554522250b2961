"""Legal Metal that clang reads otherwise: each kernel is accepted and computes what Metal says it does."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels.simulator import KernelFault, metal_kernel, settings

X = np.arange(64, dtype=np.float32)


def run(body: str, header: str = "") -> np.ndarray:
    """The output of a body over ``x`` = 0, 1, …, on a grid of 64 threads."""
    kernel = metal_kernel("k", ["x"], ["out"], f"uint i = thread_position_in_grid.x;\n{body}", header=header)
    with settings(metal_versions=((3, 2),)):
        (out,) = kernel(
            inputs=[mx.array(X)],
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )
    return np.array(out)


LANGUAGE = {
    "methods_that_hand_out_members": (
        "Window w; w.fill(x[i]); w.at(1) = 3; out[i] = w.total() + twice(twice({w.v[0]})).get();",
        3 * X + 3 + 4 * X,
        "struct Window { float v[4]; void fill(float a) { for (int k = 0; k < 4; k++) at(k) = a; }\n"
        "  thread float& at(int k) { return v[k]; } float total() { return sum_of(v); }\n"
        "static float sum_of(const thread float* p) { return p[0] + p[1] + p[2] + p[3]; } };\n"
        "struct Value { float v; float get() const thread { return v; }\n"
        "Value operator+(Value o) const { return {v + o.v}; } };\n"
        "inline Value twice(Value a) { return a + a; }\n",
    ),
    "choices_between_structs": (
        "const device Pair* p = (const device Pair*)x; Pair a = i < 8 ? p[i] : none(); Pair q = i < 4 ? none() : a; "
        "float u = 1, v = 2; (i < 1 ? u : v) = 5; thread float& r = i < 1 ? u : v; "
        "out[i] = q.a + r + pick<float, 2>(i < 2 ? q.b : 0);",
        np.where(X < 4, 0, np.where(X < 8, 2 * X, 0)) + 5,
        "struct Pair { float a, b; };\ninline Pair none() { return {0, 0}; }\n"
        "template <typename T, int N> T pick(T v) { return N > 1 ? v * 0 : v; }\n",
    ),
    "tables_of_vectors_and_matrices": (
        "out[i] = rows[i % 2].y + turn[1][0] + (turn * float2(1, 2)).x + doubled[1] + (turn * turn)[0].x;",
        2 + 2 * (X % 2) + 3 + 7 + 4 + 7,
        "constexpr float twice(float v) { return v * 2; }\nconstant float doubled[] = {twice(1), twice(2)};\n"
        "constant float2 rows[2] = {float2(1, 2), float2(3, 4)};\n"
        "constant float2x2 turn = float2x2(float2(1, 2), float2(3, 4));\n",
    ),
    "functions_with_second_results": (
        "float2 c, w; int2 e; float2 s = sincos(float2(0), c), f = frexp(float2(8), e); half h; "
        "float2 m = modf(float2(x[i] + 0.5f), w); "
        "out[i] = s.x + c.y + ldexp(f, e).x + w.y + m.x + modf(2.5h, h) + h + ilogb(float2(9)).y;",
        0 + 1 + 8 + X + 0.5 + 2.5 + 3,
    ),
    "geometry": (
        "float3 v = float3(3, 4, 0); out[i] = fast::length(v) + precise::normalize(v).x + faceforward(v, v, v).x "
        "+ refract(float2(0, -1), float2(0, 1), 1.0f).y + distance(v, float3(0)) + x[i];",
        X + 5 + 0.6 - 3 - 1 + 5,
    ),
    "functions_as_template_arguments": (
        "out[i] = apply<float, square>(x[i]);",
        X * X,
        "inline void square(float v, thread float& r) { r = v * v; }\n"
        "template <typename T, void (*f)(T, thread T&)> T apply(T v) { T r; f(v, r); return r; }\n",
    ),
    "lambdas": (
        "float s = 0; auto scaled = [=](float v) { return v * x[i]; };\n"
        "each(4, [&](int k) { s += scaled(k); }); out[i] = s;",
        6 * X,
        "template <typename F> void each(int n, F f) { for (int k = 0; k < n; k++) f(k); }\n",
    ),
    "methods_defined_outside": (
        "S s; s.set(x[i]); Box<int> b; b.set(2); out[i] = s.get() + b.at(0) + Twice()(2);",
        X + 3 + 5,
        "struct Twice { template <typename T> T operator()(T v) { thread T& w = v; return w * 2; } };\n"
        "template <> int Twice::operator()(int v) { return v * 2 + 1; }\n"
        "struct S { float v[2]; void set(float a); float get() const thread;\n"
        "  thread float& at(int k) { return v[k]; } };\n"
        "void S::set(float a) { at(0) = a; }\nfloat S::get() const thread { return v[0]; }\n"
        "template <typename T> struct Box {\n"
        "  T v[2]; void set(T a) { at(0) = a; } thread T& at(int k) { return v[k]; } };\n"
        "template <> void Box<int>::set(int a) { at(0) = a + 1; }\n",
    ),
    "constructors_for_each_address_space": (
        "threadgroup Pair<float> t[64]; Pair<float> p; p.a = x[i]; p.b = 1; t[i] = p; out[i] = t[i].a + t[i].b;",
        X + 1,
        "template <typename T> struct Pair {\n"
        "  T a, b; constexpr Pair<T>() = default; constexpr Pair<T>() threadgroup = default; };\n",
    ),
    "casts_to_constant_memory": (
        "constant uchar* p = (constant uchar*)(table); out[i] = p[4 * (i % 2)] + *(const device float*)(x + i);",
        X + 1 + X % 2,
        "constant uint table[2] = {1, 2};\n",
    ),
    "floats_times_vectors_of_half": (
        "half4 v = half4(1); float s = 2; v = 0.5 * v + v * s * s - (s + 1) * v; v *= s;\n"
        "out[i] = v.y + scaled<half>(x[i]);",
        3 + 3 * X,
        "template <typename T> T scaled(float s) { vec<T, 2> v = vec<T, 2>(T(3)); return (v * s).x; }\n",
    ),
    "vectors_declared_together": (
        "float4 a = {x[i]}, b = {1}, c, d(2.0f), e = float4(a.x, b.x, 3, 4); c = e;\n"
        "out[i] = c.x + c.y + c.z + d.w + b.w;",
        X + 1 + 3 + 2,
    ),
    "uniform_numbers": (
        "uniform<int> n = make_uniform(7), m = make_uniform(2); out[i] = n / m + n % 4 + x[i];",
        X + 6,
    ),
    "simd_max_of_bfloat": ("bfloat v = simd_max(bfloat(x[i])); out[i] = float(v);", np.where(X < 32, 31, 63)),
    "packed_words_of_64_bits": (
        "device packed_ulong2* p = (device packed_ulong2*)out;\n"
        "if (i < 16) p[i] = packed_ulong2(as_type<ulong>(float2(i, 1)), 0);",
        np.stack([X[:16], np.ones(16), np.zeros(16), np.zeros(16)], -1).ravel(),
    ),
    "logs": ('os_log_default.log("at %d", i); out[i] = x[i];', X, "#include <metal_logging>\n"),
}

# What conversions and functions give at the borders of their types.
NUMBERS = {
    "int(3e9f)": 2**31,  # 2147483647, as a float
    "int(-3e9f)": -(2**31),
    "int(NAN)": 0,
    "uint(-1.5f)": 0,
    "uchar(300.0f)": 255,
    "int4(float4(INFINITY)).y": 2**31,
    "char(half(-200.0h))": -128,
    "float(half(65520.0f))": np.inf,
    "float(half(65519.0f))": 65504,
    "float(bfloat(1.01171875f))": 1.015625,
    "1 << int(x[33])": 2,
    "uchar(uchar(250) + 10)": 4,
    "min(float(NAN), 1.0f)": 1,
    "max(half(NAN), 2.0h)": 2,
    "sinpi(1000000.5f)": 1,
    "cospi(0.5f)": 0,
    "tanpi(0.25f)": 1,
    "powr(-2.0f, 3.0f)": np.nan,
    "rint(2.5f) + round(2.5f)": 5,
    "float4(float4(x[1], 2, 3, 4) > 1.5f).y": 1,
    "int3(int3(1, 2, 3) == int3(1)).x": 1,
    "(float2(x[1], 2) > 1.5f)[1] + (half2(1) < half2(2)).x": 2,
    "((float2)(float2(x[2]) != 0.0f)).y": 1,
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_legal_language(name):
    body, expected, *header = LANGUAGE[name]
    np.testing.assert_allclose(run(body, "".join(header)), expected, rtol=1e-6)


def test_numbers():
    values = ", ".join(f"float({expression})" for expression in NUMBERS)
    body = f"float values[] = {{{values}}};\nout[i] = i < {len(NUMBERS)} ? values[i] : 0;"
    found = run(body)
    for (expression, expected), value in zip(NUMBERS.items(), found, strict=False):
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=expression)


def test_smallest_integer_divided_by_minus_one():
    with pytest.raises(KernelFault, match="k:2: integer division that overflows"):
        run("out[i] = (-2147483647 - 1) / (int(x[i]) - 1);")
