"""Checks the kernels of quantised caches on a GPU against their twins, then measures decode beside bfloat16.

Run it on a machine with an NVIDIA GPU or on a Mac: ``python benchmarks/kernels/quantized_check.py``. The exit status
is 1 if a case failed. ``--quick`` measures fewer shapes.
"""

import argparse
import sys
from functools import partial

import metal_kernels  # isort: skip  before MLX: it sets MLX's limits
import gpu_check
import mlx.core as mx
import numpy as np
from gpu_check import batch_of, case, close, seconds

from metal_kernels import RowFormat, kernels, reference

FORMATS = (("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("int4", "int4"), ("int8", "int4"))


def filled(row_format: RowFormat, blocks: int, block_size: int) -> mx.array:
    """Return pages of random rows, written by the kernel."""
    pages = mx.zeros((blocks, block_size, row_format.row_words), mx.uint32)
    shape = (blocks * block_size, row_format.num_kv_heads, row_format.head_size)
    key, value = (mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2))
    mx.eval(pages, key, value)
    slots = mx.arange(shape[0], dtype=mx.int32)
    mx.eval(kernels.quantized_reshape_and_cache(key, value, pages, slots, row_format)[1])
    return pages


def check_write(row_format: RowFormat) -> str:
    rows = mx.random.normal((70, 2 * row_format.num_kv_heads, row_format.head_size)).astype(mx.bfloat16)
    key, value = rows[:, : row_format.num_kv_heads], rows[:, row_format.num_kv_heads :]
    slots = np.random.default_rng(1).permutation(320)[:70].astype(np.int32)
    slots[::7] = -1
    pages = mx.zeros((20, 16, row_format.row_words), mx.uint32)
    want, _ = reference.quantized_reshape_and_cache(key, value, pages + 0, mx.array(slots), row_format)
    mx.eval(pages, rows, want)
    mx.eval(kernels.quantized_reshape_and_cache(key, value, pages, mx.array(slots), row_format)[1])
    differing = mx.mean((pages != want).astype(mx.float32)).item()
    if differing > 1e-4:  # a quotient that lies between two codes may fall to either
        raise AssertionError(f"{100 * differing:.3f} % of the words differ from the twin's")
    return f"ok, {100 * differing:.4f} % of the words differ"


def check_attention(row_format: RowFormat, group: int, dtype: mx.Dtype = mx.bfloat16, **options: object) -> str:
    query_lens = options.pop("query_lens", None)
    batch, blocks = batch_of((70, 12, 3000, 40), 16, query_lens)
    pages = filled(row_format, blocks, 16)
    query = (mx.random.normal((batch.num_tokens, group * row_format.num_kv_heads, row_format.head_size)) * 2).astype(
        dtype
    )
    decode = kernels.quantized_decode_kernel(metal_kernels.target(), dtype, row_format, group)
    arguments = {"scale": row_format.head_size**-0.5, **options}
    want = reference.quantized_paged_attention(query.astype(mx.float32), pages, batch, row_format, **arguments)
    got = kernels.quantized_paged_attention(query, pages, batch, row_format, decode, **arguments)
    return close(got, want, dtype)


def checks() -> None:
    for element in ("int8", "fp8_e4m3", "int4", "float16", "bfloat16", "float32"):
        case(f"write {element}", lambda e=element: check_write(RowFormat(3, 96, e, e)))
    for key, value in (*FORMATS, ("float16", "fp8_e4m3"), ("float32", "bfloat16")):
        case(f"decode {key}, {value}", lambda f=(key, value): check_attention(RowFormat(2, 128, *f), 2))
    for head_size in (64, 80, 96, 192, 256):
        row_format = RowFormat(2, head_size, "fp8_e4m3", "int4")
        case(f"decode head size {head_size}", lambda r=row_format: check_attention(r, 3, mx.float16))
    int8 = RowFormat(2, 128, "int8", "int8")
    case("decode window, soft cap, group 8", lambda: check_attention(int8, 8, sliding_window=1000, soft_cap=5.0))
    case("several rows", lambda: check_attention(int8, 2, query_lens=[1, 5, 30, 1]))


def decode_time(
    reqs: int, context: int, q_heads: int, kv_heads: int, row_format: RowFormat | None
) -> tuple[float, int]:
    """Return seconds of an attention call, and the bytes of keys and values that it reads."""
    batch, blocks = batch_of([context] * reqs, 16)
    layers = 4  # so that a layer's pages are not still in the processor's cache
    query = mx.random.normal((reqs, q_heads, 128)).astype(mx.bfloat16)
    mx.eval(query)
    target, group = metal_kernels.target(), q_heads // kv_heads
    if row_format is None:
        caches = [mx.random.normal((blocks, 2, 16, kv_heads, 128)).astype(mx.bfloat16) for _ in range(layers)]
        size = reqs * context * kv_heads * 128 * 4
        plain = kernels.decode_kernel(target, query.dtype, mx.bfloat16, 128, 16, group)
        attend = partial(kernels.paged_attention, batch=batch, decode=plain, scale=128**-0.5)
    else:
        caches = [filled(row_format, blocks, 16) for _ in range(layers)]
        size = reqs * context * row_format.row_bytes
        decode = kernels.quantized_decode_kernel(target, query.dtype, row_format, group)
        attend = partial(
            kernels.quantized_paged_attention, batch=batch, row_format=row_format, decode=decode, scale=128**-0.5
        )
        want = reference.quantized_paged_attention(
            query[:1], caches[0], batch_of_first(batch), row_format, scale=128**-0.5
        )
        close(attend(query, caches[0])[:1], want, query.dtype)
    mx.eval(caches)

    def chain(value: mx.array) -> mx.array:
        for _ in range(7):
            for cache in caches:
                value = attend(value, cache)
        return value

    return seconds(chain, query, 7 * layers), size


def batch_of_first(batch: metal_kernels.RaggedBatch) -> metal_kernels.RaggedBatch:
    return metal_kernels.RaggedBatch(batch.query_start_loc[:2], batch.seq_lens[:1], batch.block_table[:1])


def decode_speed(reqs: int, context: int, q_heads: int, kv_heads: int) -> str:
    plain, size = decode_time(reqs, context, q_heads, kv_heads, None)
    lines = [f"bfloat16 {plain * 1e6:.1f} us, {size / plain / 1e9:.0f} GB/s"]
    for key, value in FORMATS:
        row_format = RowFormat(kv_heads, 128, key, value)
        mx.clear_cache()
        taken, size = decode_time(reqs, context, q_heads, kv_heads, row_format)
        lines.append(
            f"{key}/{value} {taken * 1e6:.1f} us, {size / taken / 1e9:.0f} GB/s, {plain / taken:.2f} x as fast"
        )
    return "; ".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure fewer shapes")
    quick = parser.parse_args().quick
    if metal_kernels.target() == "cpu":
        print("quantized_check needs a GPU: the default device is a CPU")
        return 1
    print(f"MLX {mx.__version__} on {metal_kernels.target()}: {mx.device_info()}")
    checks()
    shapes = [(32, 4096, 16, 8), (32, 8192, 16, 8), (1, 32768, 16, 8), (32, 8192, 32, 4)]
    for shape in shapes[1:2] if quick else shapes:
        name = "decode, batch {}, context {}, {}/{} heads x 128".format(*shape)
        case(name, lambda s=shape: decode_speed(*s))
    print(f"{gpu_check.failures} failed")
    return min(gpu_check.failures, 1)


if __name__ == "__main__":
    sys.exit(main())
