"""Kernels that run on GPUs elsewhere, written by nobody here: they compile, run clean and compute the right values."""

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import simulator
from metal_kernels.simulator import Source, check, metal_kernel
from metal_kernels.simulator.capture import mlx_include_directory

KERNELS = "mlx/backend/metal/kernels"


def difference(a, b):
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


def instantiate(*lines):
    """Explicit instantiations, as MLX's own macro writes them."""
    parts = []
    for number, line in enumerate(lines):
        parts.append(f'template [[host_name("k{number}")]] [[kernel]] decltype({line}) {line};')
    return "\n".join(parts)


# Headers of the MLX wheel, in the order MLX's own sources include them, and templates of theirs.
HEADERS = {
    "softmax": (["utils.h", "softmax.h"], ["softmax_single_row<half>", "softmax_looped<bfloat16_t, float>"]),
    "logsumexp": (["utils.h", "logsumexp.h"], ["logsumexp<float>", "logsumexp_looped<half>"]),
    "arange": (["utils.h", "arange.h"], ["arange<int>", "arange<float>"]),
    "sdpa_vector": (
        ["utils.h", "sdpa_vector.h"],
        [
            "sdpa_vector<half, 64, 64>",
            "sdpa_vector<bfloat16_t, 128, 128>",
            "sdpa_vector_2pass_1<float, 128, 128>",
            "sdpa_vector_2pass_2<half, 128>",
        ],
    ),
    "gemv": (["utils.h", "gemv.h"], ["gemv<float, 1, 8, 1, 32, 4, 4, false, false>"]),
    "copy": (["utils.h", "copy.h"], ["copy_s<half, float>", "copy_v<float, bfloat16_t>"]),
    "searchsorted": (["utils.h", "sort.h", "searchsorted.h"], []),
    "quantized": (
        ["utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"],
        ["affine_qmv_fast<half, 64, 4, 0>", "affine_dequantize<bfloat16_t, 64, 8>"],
    ),
    "gemm": (
        ["utils.h", "steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"],
        ["gemm<half, 64, 64, 16, 2, 2, false, true>"],
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_mlx_headers(name):
    includes, templates = HEADERS[name]
    text = "#include <metal_stdlib>\n#include <metal_simdgroup>\nusing namespace metal;\n"
    text += "".join(f'#include "{KERNELS}/{include}"\n' for include in includes)
    check(Source(((name, text + instantiate(*templates)),), (mlx_include_directory(),)), [(3, 2)])


@pytest.fixture
def mlx_lm():
    """Imports a module of mlx-lm with kernels created by the simulator."""
    pytest.importorskip("mlx_lm")
    with simulator.installed(pretend_metal=True):
        yield import_module


@pytest.mark.parametrize("dtype", [mx.float32, pytest.param(mx.bfloat16, marks=pytest.mark.slow)])
def test_gated_delta(mlx_lm, dtype):
    module = mlx_lm("mlx_lm.models.gated_delta")
    mx.random.seed(0)
    batch, steps, key_heads, value_heads, key_size, value_size = 1, 3, 2, 4, 64, 32
    q, k = (mx.random.normal((batch, steps, key_heads, key_size)).astype(dtype) * 0.1 for _ in range(2))
    v = mx.random.normal((batch, steps, value_heads, value_size)).astype(dtype)
    g, beta = (mx.sigmoid(mx.random.normal((batch, steps, value_heads))).astype(dtype) for _ in range(2))
    state = mx.zeros((batch, value_heads, value_size, key_size))
    y, after = module.gated_delta_kernel(q, k, v, g, beta, state)
    y_ops, after_ops = module.gated_delta_ops(q, k, v, g, beta, state)
    assert difference(y, y_ops) < (1e-5 if dtype == mx.float32 else 2e-2)
    assert difference(after, after_ops) < 1e-4


@pytest.mark.parametrize("dtype", [mx.float16, pytest.param(mx.float32, marks=pytest.mark.slow)])
def test_qk_norm_rope(mlx_lm, dtype):
    module = mlx_lm("mlx_lm.kernels.qk_norm_rope")
    mx.random.seed(0)
    x = mx.random.normal((2, 3, 2 * (4 + 2) * 64)).astype(dtype)
    q, _ = module.qk_norm_rope(
        x, n_heads=4, n_kv_heads=2, head_dim=64, eps=1e-5, query_scale=0.125, rope_base=10000.0, offset=7
    )
    expected = mx.fast.rms_norm(x[..., :256].reshape(2, 3, 4, 64), None, 1e-5) * 0.125
    expected = mx.fast.rope(expected.transpose(0, 2, 1, 3), 64, traditional=True, base=10000.0, scale=1.0, offset=7)
    assert difference(q.reshape(2, 3, 4, 64), expected.transpose(0, 2, 1, 3)) < 2e-3


def test_mlx_documentation_example():
    # The grid-sample kernel of MLX's documentation has this shape: strides, integer arithmetic, no guards.
    source = """
        uint elem = thread_position_in_grid.x;
        uint loc = elem_to_loc(elem, inp_shape, inp_strides, inp_ndim);
        T tmp = inp[loc];
        out[elem] = metal::exp(tmp);
    """
    kernel = metal_kernel("myexp_strided", ["inp"], ["out"], source, ensure_row_contiguous=False)
    a = mx.random.normal((4, 16)).astype(mx.float16)[::2]
    (out,) = kernel(
        inputs=[a],
        template=[("T", mx.float16)],
        grid=(a.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[a.shape],
        output_dtypes=[a.dtype],
    )
    np.testing.assert_allclose(np.array(out), np.array(mx.exp(a)), rtol=2e-3)


def test_softmax_of_rows():
    kernel = metal_kernel(
        "softmax_row",
        ["x", "size"],
        ["out"],
        "threadgroup float scratch[2];\n(void)scratch;\n"
        "uint row = threadgroup_position_in_grid.x, lane = thread_index_in_simdgroup;\n"
        "float best = Limits<float>::min;\n"
        "for (int k = lane; k < size; k += 32) best = max(best, float(x[row * size + k]));\n"
        "best = simd_max(best);\nfloat total = 0;\n"
        "for (int k = lane; k < size; k += 32) total += fast::exp(float(x[row * size + k]) - best);\n"
        "total = simd_sum(total);\n"
        "for (int k = lane; k < size; k += 32) "
        "out[row * size + k] = T(fast::exp(float(x[row * size + k]) - best) / total);\n",
    )
    x = mx.random.normal((3, 50)).astype(mx.bfloat16)
    (out,) = kernel(
        inputs=[x, 50],
        template=[("T", mx.bfloat16)],
        grid=(3 * 32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    assert difference(out, mx.softmax(x.astype(mx.float32), axis=-1)) < 5e-3
