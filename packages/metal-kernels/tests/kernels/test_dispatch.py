"""Which calls kernels serve, and why not the others."""

import mlx.core as mx
import pytest

from metal_kernels.kernels import (
    Accepted,
    DecodeVariant,
    MatrixVariant,
    Rejected,
    decode_kernel,
    page_kernels,
    write_decode_kernel,
)
from metal_kernels.kernels.dispatch import FLOAT_DTYPES, HEAD_SIZES


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target": "cpu"}, "CPU"),
        ({"query_dtype": mx.int32}, "float16"),
        ({"cache_dtype": mx.uint8}, "float16"),
        ({"head_size": 72}, "head size 72"),
        ({"block_size": 4}, "block size 4"),
    ],
)
def test_decode_says_why_not(change, why):
    call = {"target": "cuda", "query_dtype": mx.float16, "cache_dtype": mx.float16, "head_size": 64, "block_size": 8}
    assert isinstance(decode_kernel(**call, group=1), Accepted)
    answer = decode_kernel(**(call | change), group=1)
    assert isinstance(answer, Rejected)
    assert why in answer.why


@pytest.mark.parametrize("call", [("cpu", mx.float16, 64), ("metal", mx.int8, 64), ("metal", mx.float16, 4)])
def test_page_kernels_say_why_not(call):
    assert isinstance(page_kernels("metal", mx.float16, 64), Accepted)
    assert isinstance(page_kernels(*call), Rejected)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 64])
@pytest.mark.parametrize("target", ["metal", "cuda"])
def test_every_head_has_its_place_in_threadgroup_memory(target, head_size, dtype, group):
    variant = decode_kernel(target, dtype, dtype, head_size, 16, group).variant
    matrices = isinstance(variant, MatrixVariant)
    assert variant.heads <= 8 if matrices else head_size % variant.lanes == 0
    assert (variant.parts - 1) * variant.heads < group <= variant.parts * variant.heads
    assert variant.simdgroups * (variant.heads * (head_size + 3) + 8 * matrices) * 4 <= 32 * 1024


def test_large_groups_on_cuda_use_matrices():
    call = {"target": "cuda", "query_dtype": mx.bfloat16, "cache_dtype": mx.bfloat16, "head_size": 128}
    assert isinstance(decode_kernel(**call, block_size=16, group=8).variant, MatrixVariant)
    for change in ({"group": 2}, {"target": "metal"}, {"query_dtype": mx.float32}, {"head_size": 96}):
        call_with = call | {"block_size": 16, "group": 8} | change
        assert isinstance(decode_kernel(**call_with).variant, DecodeVariant)


def test_threadgroups_that_share_a_key_head_do_not_write():
    call = {"target": "cuda", "query_dtype": mx.float16, "cache_dtype": mx.float16, "head_size": 64, "block_size": 8}
    assert isinstance(write_decode_kernel(**call, group=8), Accepted)
    assert "share a key head" in write_decode_kernel(**call, group=9).why
