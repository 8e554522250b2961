"""Kernels that Metal's compiler refuses: each is refused here, for the stated reason."""

from dataclasses import dataclass

import pytest

from metal_kernels.simulator import KernelCompileError, Source, check

PARAMETERS = (
    "const device float* x [[buffer(0)]], device float* out [[buffer(1)]], "
    "const device half* h [[buffer(2)]], device bfloat* b [[buffer(3)]], "
    "const constant int* c [[buffer(4)]], device int* n [[buffer(5)]], "
    "uint i [[thread_position_in_grid]]"
)


@dataclass
class Case:
    """A kernel body, with declarations before it, and words of the diagnostic."""

    body: str
    reason: str
    header: str = ""


BODIES = {
    # Address spaces
    "device_pointer_to_threadgroup": Case("threadgroup float* p = out;", "cannot initialize a variable"),
    "constant_pointer_to_device": Case("const device int* p = c;", "cannot initialize a variable"),
    "device_argument_for_thread_parameter": Case(
        "f(out);", "no matching function", "void f(thread float* p) { *p = 1; }\n"
    ),
    "constant_argument_for_device_parameter": Case(
        "n[0] = f(c);", "no matching function", "int f(const device int* p) { return *p; }\n"
    ),
    "threadgroup_argument_for_device_parameter": Case(
        "threadgroup float t[4]; f(t);", "no matching function", "void f(device float* p) { *p = 1; }\n"
    ),
    "pointer_without_space": Case("float v = x[i]; float* p = &v; out[i] = *p;", "needs an address space"),
    "reference_without_space": Case("float v = x[i]; float& r = v; r = 1; out[i] = v;", "needs an address space"),
    "function_pointer_without_space": Case(
        "float v = f(&out[i]);",
        "needs an address space",
        "float f(device float* q) { const float* p = q; return *p; }\n",
    ),
    "cast_without_space": Case("float v = *(float*)(out + i); out[i] = v;", "needs an address space"),
    "reinterpret_without_space": Case("out[i] = *reinterpret_cast<const float4*>(x)[0];", "needs an address space"),
    "threadgroup_variable_in_function": Case(
        "out[i] = f();", "own body", "float f() { threadgroup float t[4]; return t[0]; }\n"
    ),
    "write_to_constant": Case("c[0] = 1;", "read-only"),
    "write_to_const_input": Case("x[i] = 1;", "read-only"),
    "constant_from_a_function_of_metal": Case(
        "out[i] = t;", "got a call of 'sqrt'", "constant float t = sqrt(2.0f);\n"
    ),
    "constant_from_a_function": Case(
        "out[i] = t[0];", "got a call of 'f'", "float f(int k) { return k; }\nconstant float t[2] = {f(1), 2};\n"
    ),
    "mutable_global": Case("out[i] = g++;", "constant address space", "float g = 0;\n"),
    # Types and conversions
    "float_to_bfloat": Case("b[i] = x[i];", "implicit conversion"),
    "half_to_bfloat": Case("b[i] = h[i];", "incompatible type"),
    "bfloat_to_half": Case("half v = b[i]; out[i] = v;", "cannot initialize"),
    "long_long": Case("long long v = i; out[i] = v;", "'long long' does not exist"),
    "double_variable": Case("double d = 1; out[i] = d;", "'double' does not exist"),
    "vector_too_many_components": Case("float2 v = float2(1, 2, 3); out[i] = v.x;", "too many components"),
    "vector_too_few_components": Case("float4 v = float4(1, 2, 3); out[i] = v.x;", "too few components"),
    "vector_sizes_mixed": Case("float4 v = float4(x[i]); float2 w = v; out[i] = w.x;", "cannot initialize"),
    "vector_conversion_of_other_size": Case("float2 v = float2(float4(1.0f)); out[i] = v.x;", "different sizes"),
    "no_such_component": Case("float2 v = float2(1.0f); out[i] = v.z;", "vector component access"),
    "as_type_of_other_size": Case("out[i] = as_type<float>(h[i]);", "different sizes"),
    "ambiguous_max": Case("out[i] = max(x[i], 0);", "ambiguous"),
    "ambiguous_min_signs": Case("n[i] = min(n[i], i);", "ambiguous"),
    "half_and_float_max": Case("out[i] = max(x[i], h[i]);", "ambiguous"),
    "exp_of_integer": Case("out[i] = exp(n[i]);", "ambiguous"),
    "narrowing_in_braces": Case("half v{x[i]}; out[i] = v;", "narrowed"),
    "choice_between_lanes": Case(
        "float4 v = float4(x[i]); v = v > 0.0f ? v : -v; out[i] = v.x;", "cannot be a vector"
    ),
    "runtime_array_size": Case("float v[i + 1]; out[i] = v[0];", "constant expression"),
    "missing_return": Case("out[i] = f(i);", "return", "float f(uint i) { if (i > 1) return 1; }\n"),
    "uninitialised_scalar": Case("float v; out[i] = v + 1;", "uninitialized"),
    "sometimes_uninitialised": Case("float v; if (i > 2) v = 1; out[i] = v;", "uninitialized"),
    # Functions that Metal lacks, or has with other arguments
    "cuda_thread_index": Case("out[threadIdx.x] = 1;", "threadIdx"),
    "cuda_barrier": Case("__syncthreads(); out[i] = 1;", "__syncthreads"),
    "opencl_global_id": Case("out[get_global_id(0)] = 1;", "get_global_id"),
    "opencl_barrier": Case("barrier(1); out[i] = 1;", "barrier"),
    "std_namespace": Case("out[i] = std::max(x[i], 0.0f);", "std"),
    "misspelt_function": Case("out[i] = rsqr(x[i]);", "rsqr"),
    "barrier_without_flags": Case("threadgroup_barrier(); out[i] = 1;", "no matching function"),
    "c_function": Case("out[i] = expf(x[i]);", "expf"),
    "barrier_with_two_arguments": Case(
        "threadgroup_barrier(mem_flags::mem_none, 1); out[i] = 1;", "no matching function"
    ),
    "barrier_with_integer": Case("threadgroup_barrier(2); out[i] = 1;", "no matching function"),
    "no_such_flag": Case("threadgroup_barrier(mem_flags::mem_local); out[i] = 1;", "mem_local"),
    "simd_sum_of_long": Case("out[i] = simd_sum((long)i);", "no matching function"),
    "simd_sum_of_bool": Case("out[i] = simd_sum(x[i] > 0);", "no matching function"),
    "shuffle_without_lane": Case("out[i] = simd_shuffle(x[i]);", "no matching function"),
    "matrix_of_other_size": Case("simdgroup_matrix<float, 4, 4> m; out[i] = 1;", "8x8"),
    "matrix_of_integers": Case("simdgroup_matrix<int, 8, 8> m; out[i] = 1;", "float, half or bfloat"),
    "matrix_load_from_constant": Case(
        "simdgroup_matrix<float, 8, 8> m; simdgroup_load(m, (const constant float*)c); out[i] = 1;",
        "no matching function",
    ),
    "atomic_on_plain_pointer": Case("atomic_fetch_add_explicit(n, 1, memory_order_relaxed);", "no matching function"),
    "atomic_float_max": Case(
        "atomic_fetch_max_explicit((device atomic<float>*)out, 1.0f, memory_order_relaxed);",
        "no matching function",
    ),
    "atomic_float_sum_in_threadgroup": Case(
        "threadgroup atomic_float t; atomic_fetch_add_explicit(&t, 1.0f, memory_order_relaxed);",
        "no matching function",
    ),
    "atomic_sum_of_64_bits": Case(
        "atomic_fetch_add_explicit((device atomic_ulong*)out, 1ul, memory_order_relaxed);", "no matching function"
    ),
    "atomic_without_order": Case("atomic_fetch_add_explicit((device atomic_int*)n, 1);", "no matching function"),
    "atomic_acquire": Case("atomic_fetch_add_explicit((device atomic_int*)n, 1, memory_order_acq_rel);", "relaxed"),
    "atomic_of_short": Case(
        "device atomic<short>* p = (device atomic<short>*)n; atomic_load_explicit(p, memory_order_relaxed);",
        "atomic holds",
    ),
    "clz_of_floats": Case("out[i] = clz(float2(x[i])).x;", "no matching function"),
    # Names of the simulator's own, and of clang's for the host's processor
    "name_of_the_simulator": Case("out[i] = msl_lane();", "'msl_lane' does not exist"),
    "type_of_the_simulator": Case("MslContext c; out[i] = 1;", "'MslContext' does not exist"),
    "macro_of_the_simulator": Case(
        "out[i] = f(x[i]);", "'MSL_FN' does not exist", "MSL_FN float f(float v) { return v; }\n"
    ),
    "builtin_of_the_processor": Case("out[i] = __builtin_ia32_rdtsc();", "'__builtin_ia32_rdtsc' does not exist"),
    "builtin_of_the_library": Case("out[i] = __builtin_fmaf(x[i], 2, 3);", "'__builtin_fmaf' does not exist"),
    # Language that Metal does not have
    "recursion": Case(
        "out[i] = even(x[i]);",
        "calls itself",
        "float odd(float v);\nfloat even(float v) { return v < 1 ? v : odd(v - 1); }\n"
        "float odd(float v) { return even(v - 1); }\n",
    ),
    "method_on_device_object": Case(
        "device S* s = (device S*)out; s[i].clear();",
        "not marked 'device'",
        "struct S { float v; void clear() { v = 0; } };\n",
    ),
    "method_on_threadgroup_object": Case(
        "threadgroup S s; s.v = 1; out[i] = s.get();",
        "not marked 'threadgroup'",
        "struct S { float v; float get() const { return v; } };\n",
    ),
    "noexcept_operator": Case("out[i] = noexcept(x[i]);", "'noexcept' does not exist"),
    "variadic_function": Case("out[i] = f(1, 2);", "variadic", "int f(int a, ...) { return a; }\n"),
    "register": Case("register float v = 1; out[i] = v;", "register"),
    "dynamic_cast": Case("out[i] = *dynamic_cast<device float*>(out);", "'dynamic_cast' does not exist"),
    "goto": Case("again: if (x[i] > 0) goto again;", "'goto' does not exist"),
    "inline_assembly": Case('asm("nop"); out[i] = 1;', "'asm' does not exist"),
    "exception": Case("if (i > 3) throw 1;", "'throw' does not exist"),
    "new": Case("device float* p = new float[4];", "'new' does not exist"),
    "virtual": Case("out[i] = 1;", "'virtual' does not exist", "struct S { virtual void f(); };\n"),
    "static_local": Case("static float v = 0; out[i] = v;", "static local"),
    "cuda_shared": Case("__shared__ float t[4]; out[i] = 1;", "'__shared__' does not exist"),
    "opencl_space": Case("__global float* p = out; p[i] = 1;", "'__global' does not exist"),
    "printf": Case('printf("%f", x[i]);', "printf"),
    "undeclared_name": Case("out[i] = y[i];", "undeclared"),
    "missing_semicolon": Case("out[i] = x[i]", "expected ';'"),
    "recursive_template_missing": Case(
        "out[i] = f<float>(x[i]);", "no matching function", "template <typename T, int N> T f(T v) { return v; }\n"
    ),
}

SIGNATURES = {
    "wrong_attribute_type": ("device float* out [[buffer(0)]], float i [[thread_position_in_grid]]", "not valid"),
    "misspelt_attribute": ("device float* out [[buffer(0)]], uint i [[thread_pos_in_grid]]", "attribute"),
    "missing_attribute": ("device float* out [[buffer(0)]], uint i", "no attribute"),
    "duplicate_buffer": (
        "device float* out [[buffer(0)]], const device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]",
        "used twice",
    ),
    "too_many_buffers": ("device float* out [[buffer(31)]], uint i [[thread_position_in_grid]]", "at most 31"),
    "parameter_without_space": ("float* out [[buffer(0)]], uint i [[thread_position_in_grid]]", "address space"),
    "thread_parameter": (
        "thread float* out [[buffer(0)]], uint i [[thread_position_in_grid]]",
        "thread address space",
    ),
    "threadgroup_parameter_without_index": (
        "device float* out [[buffer(0)]], threadgroup float* t, uint i [[thread_position_in_grid]]",
        "threadgroup(n)",
    ),
}


def kernel(body: str, header: str = "", parameters: str = PARAMETERS, returns: str = "void") -> Source:
    return Source(
        (
            ("header", f"#include <metal_stdlib>\nusing namespace metal;\n{header}"),
            ("signature", f"[[kernel]] {returns} k({parameters}) {{"),
            ("body", body),
            ("end", "}"),
        )
    )


@pytest.mark.parametrize("name", BODIES)
def test_body_is_refused(name: str) -> None:
    case = BODIES[name]
    with pytest.raises(KernelCompileError) as refused:
        check(kernel(case.body, case.header), [(3, 2)])
    message = str(refused.value)
    assert case.reason in message
    assert "body:1: error" in message or "header:" in message


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_refused(name: str) -> None:
    parameters, reason = SIGNATURES[name]
    with pytest.raises(KernelCompileError, match=reason.replace("(", r"\(").replace(")", r"\)")):
        check(kernel("out[i] = 1;", parameters=parameters), [(3, 2)])


def test_kernel_must_return_void() -> None:
    with pytest.raises(KernelCompileError, match="must return void"):
        check(kernel("out[i] = 1; return 1;", returns="int"), [(3, 2)])


EACH = "template <typename F> void each(int n, F f) { for (int k = 0; k < n; k++) f(k); }\n"
FENCE = "n[i] = 1; atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);"


def test_language_versions_differ() -> None:
    check(kernel(FENCE), [(3, 2)])
    with pytest.raises(KernelCompileError, match=r"Metal 3\.1"):
        check(kernel(FENCE), [(3, 1)])


def test_lambda_since_3_2() -> None:
    lambdas = kernel("float s = 0; each(4, [&](int k) { s += x[k]; }); out[i] = s;", EACH)
    check(lambdas, [(3, 2)])
    with pytest.raises(KernelCompileError, match=r"Metal 3\.1:\nbody:1: error: lambda expressions"):
        check(lambdas, [(3, 1)])


def test_line_within_a_part() -> None:
    body = "float v = x[i];\nfloat w = v;\nout[i] = w + missing;\n"
    with pytest.raises(KernelCompileError, match=r"body:3: error: .*\n    out\[i\] = w \+ missing;"):
        check(kernel(body), [(3, 2)])
