"""Checks latent decode on a GPU against its twin, then measures it.

Run it on a machine with an NVIDIA GPU or on a Mac: ``python benchmarks/kernels/mla_check.py``. The exit status is 1
if a case failed.
"""

import sys

import metal_kernels  # isort: skip  before MLX: it sets MLX's limits
import gpu_check
import mlx.core as mx
from gpu_check import batch_of, case, close, seconds

from metal_kernels import kernels, reference

LATENT, ROPE = 512, 64


def rows(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    return tuple(mx.random.normal((*shape, size)).astype(dtype) for size in (LATENT, ROPE))


def check(q_heads: int, dtype: mx.Dtype, query_lens: list[int] | None = None) -> str:
    batch, blocks = batch_of((70, 12, 3000, 40), 16, query_lens)
    latent, rope = rows((batch.num_tokens, q_heads), dtype)
    cache = mx.random.normal((blocks, 16, LATENT + ROPE)).astype(dtype)
    mx.eval(latent, rope, cache)
    decode = kernels.mla_decode_kernel(metal_kernels.target(), dtype, dtype, LATENT, ROPE)
    float32 = (array.astype(mx.float32) for array in (latent, rope, cache))
    want = reference.mla_attention(*float32, batch, scale=0.06)
    return close(kernels.mla_attention(latent, rope, cache, batch, decode, scale=0.06), want, dtype)


def speed(reqs: int, context: int, q_heads: int, variant: kernels.LatentVariant | None = None) -> str:
    batch, blocks = batch_of([context] * reqs, 16)
    layers = min(
        28, max(4, int(3e8 / (blocks * 16 * 1152)))
    )  # so that a layer's pages are not still in the processor's cache
    caches = [mx.random.normal((blocks, 16, LATENT + ROPE)).astype(mx.bfloat16) for _ in range(layers)]
    latent, rope = rows((reqs, q_heads), mx.bfloat16)
    mx.eval(caches, latent, rope)
    decode = kernels.mla_decode_kernel(metal_kernels.target(), mx.bfloat16, mx.bfloat16, LATENT, ROPE)
    decode = decode if variant is None else kernels.Accepted(variant)

    def attend(value: mx.array) -> mx.array:
        for cache in caches:
            value = kernels.mla_attention(value, rope, cache, batch, decode, scale=0.06)
        return value

    want = reference.mla_attention(latent, rope, caches[0], batch, scale=0.06)
    close(kernels.mla_attention(latent, rope, caches[0], batch, decode, scale=0.06), want, mx.bfloat16)
    taken = seconds(attend, latent, layers)
    operations = 2 * reqs * context * q_heads * (2 * LATENT + ROPE)
    rate = reqs * context * (LATENT + ROPE) * 2 / taken
    return f"{taken * 1e6:.1f} us, {rate / 1e9:.0f} GB/s, {operations / taken / 1e12:.0f} TFLOP/s"


def main() -> int:
    if metal_kernels.target() == "cpu":
        print("mla_check needs a GPU: the default device is a CPU")
        return 1
    print(f"MLX {mx.__version__} on {metal_kernels.target()}: {mx.device_info()}")
    for dtype in (mx.float16, mx.bfloat16):
        for q_heads in (16, 20):
            case(f"{q_heads} heads, {dtype}", lambda h=q_heads, d=dtype: check(h, d))
    case("several rows", lambda: check(16, mx.bfloat16, [1, 5, 30, 1]))
    for reqs, context, q_heads in ((32, 1024, 16), (32, 8192, 16), (1, 32768, 16), (32, 8192, 128)):
        name = f"decode, batch {reqs}, context {context}, {q_heads} heads over {LATENT} + {ROPE} bf16"
        case(name, lambda a=(reqs, context, q_heads): speed(*a))
    print(f"{gpu_check.failures} failed")
    return min(gpu_check.failures, 1)


if __name__ == "__main__":
    sys.exit(main())
