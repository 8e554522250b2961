"""Checks the kernels on a GPU against their twins, then measures paged decode and the cache write.

Run it on a machine with an NVIDIA GPU or on a Mac: ``python benchmarks/kernels/gpu_check.py``. A case that fails
says so and the next one runs; the exit status is the number of failures, at most 1. ``--quick`` checks fewer
combinations.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import metal_kernels  # isort: skip  before MLX: it sets MLX's limits
import mlx.core as mx
import numpy as np

from metal_kernels import RaggedBatch, kernels, reference
from metal_kernels.kernels.dispatch import BLOCK_SIZES, FLOAT_DTYPES, HEAD_SIZES

TOLERANCE = {mx.float32: 2e-3, mx.float16: 4e-3, mx.bfloat16: 3e-2}  # MLX may multiply float32 as TF32
BUDGET = 130.0  # seconds for the checks
failures = 0


def case(name: str, run: Callable[[], str]) -> None:
    global failures
    try:
        print(f"{name}: {run()}", flush=True)
    except Exception as error:  # noqa: BLE001  one failure must not hide the others
        failures += 1
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{name}: FAILED {type(error).__name__} at {where.name}:{where.lineno}: {str(error)[:1200]}", flush=True)


def batch_of(seq_lens: Sequence[int], block_size: int, query_lens: list[int] | None = None) -> tuple[RaggedBatch, int]:
    lens = np.array(seq_lens, np.int32)
    needed = -(-lens // block_size)
    ids = np.random.default_rng(0).permutation(needed.sum()).astype(np.int32) + 1
    table = np.zeros((len(lens), needed.max()), np.int32)
    for request, count in enumerate(needed):
        table[request, :count], ids = ids[:count], ids[count:]
    starts = np.concatenate([[0], np.cumsum(query_lens or [1] * len(lens))]).astype(np.int32)
    return RaggedBatch(starts, lens, table), int(needed.sum()) + 1


def close(got: mx.array, want: mx.array, dtype: mx.Dtype) -> str:
    error = mx.abs(got.astype(mx.float32) - want.astype(mx.float32)).max().item()
    if not error <= TOLERANCE[dtype] * max(1.0, mx.abs(want.astype(mx.float32)).max().item()):
        raise AssertionError(f"largest difference {error}")
    return f"ok, largest difference {error:.1e}"


def check_write(dtype: mx.Dtype) -> str:
    cache = mx.random.normal((20, 2, 16, 3, 80)).astype(dtype)
    joined = mx.random.normal((70, 9, 80)).astype(dtype)
    slots = np.random.default_rng(1).permutation(320)[:70].astype(np.int32)
    slots[::7] = -1
    key, value = joined[:, 3:6], joined[:, 6:]
    want, _ = reference.reshape_and_cache(key, value, cache + 0, mx.array(slots))
    mx.eval(cache, joined, want)
    _, token = kernels.reshape_and_cache(key, value, cache, mx.array(slots))
    gathered = kernels.gather_blocks(cache, mx.arange(20, dtype=mx.int32), token)
    mx.eval(token, gathered)
    if not (mx.array_equal(cache, want).item() and mx.array_equal(gathered, want).item()):
        raise AssertionError("the cache differs from the twin's")
    return "ok"


def check_copy(dtype: mx.Dtype) -> str:
    cache = mx.random.normal((9, 2, 16, 3, 80)).astype(dtype)
    sources, targets = mx.array([1, 2, 3]), mx.array([2, 1, 8])
    want, _ = reference.copy_blocks(cache, sources, targets)
    mx.eval(cache, want)
    mx.eval(kernels.copy_blocks(cache, sources, targets)[1])
    if not mx.array_equal(cache, want).item():
        raise AssertionError("the cache differs from the twin's")
    return "ok"


def check_public(dtype: mx.Dtype) -> str:
    batch, blocks = batch_of([40, 17, 300], 16, [1, 5, 100])
    cache = mx.random.normal((blocks, 2, 16, 2, 64)).astype(dtype)
    query = mx.random.normal((106, 4, 64)).astype(dtype)
    key, value = (mx.random.normal((106, 2, 64)).astype(dtype) for _ in range(2))
    at = np.concatenate([np.arange(n - rows, n) for n, rows in ((40, 1), (17, 5), (300, 100))])
    request = np.repeat(np.arange(3), [1, 5, 100])
    slots = mx.array((batch.block_table[request, at // 16] * 16 + at % 16).astype(np.int32))
    twin, _ = reference.reshape_and_cache(key, value, cache + 0, slots)
    want = reference.paged_attention(*(a.astype(mx.float32) for a in (query, twin)), batch, scale=0.125)
    mx.eval(cache, want)
    pages, token = metal_kernels.reshape_and_cache(key, value, cache, slots)
    out = metal_kernels.paged_attention(query, pages, batch, scale=0.125, order_token=token)
    return close(out, want, dtype)


def check_attention(
    dtype: mx.Dtype,
    head_size: int,
    block_size: int = 16,
    group: int = 2,
    query_lens: list[int] | None = None,
    sinks: bool = False,
    seq_lens: tuple[int, ...] = (70, 12, 3000, 9),
    **options: float,
) -> str:
    batch, blocks = batch_of(seq_lens, block_size, query_lens)
    query = (mx.random.normal((batch.num_tokens, 2 * group, head_size)) * 2).astype(dtype)
    cache = mx.random.normal((blocks, 2, block_size, 2, head_size)).astype(dtype)
    extra = mx.random.normal((2 * group,)) if sinks else None
    decode = kernels.decode_kernel(metal_kernels.target(), dtype, dtype, head_size, block_size, group)
    arguments = {"scale": head_size**-0.5, "sinks": extra, **options}
    mx.eval(query, cache)
    # In float32 throughout, from the same rounded inputs: the twin then has no rounding of its own.
    want = reference.paged_attention(query.astype(mx.float32), cache.astype(mx.float32), batch, **arguments)
    return close(kernels.paged_attention(query, cache, batch, decode, **arguments), want, dtype)


def check_on_the_way(dtype: mx.Dtype, group: int) -> str:
    batch, blocks = batch_of([70, 12, 3000, 9], 16)
    qkv = mx.random.normal((4, (group + 2) * 2 * 128)).astype(dtype)
    angles, weight = mx.random.uniform(shape=(4, 64)), mx.random.normal((128,)).astype(dtype)
    turns = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=1)
    cache = mx.random.normal((blocks, 2, 16, 2, 128)).astype(dtype)
    last = batch.seq_lens - 1
    slots = mx.array(np.pad(batch.block_table[np.arange(4), last // 16] * 16 + last % 16, (0, 4)))
    plan = metal_kernels.plan_decode(batch, np.arange(4, dtype=np.int32), None, 16)
    norms = {"q_norm": weight, "k_norm": weight, "eps": 1e-6}
    query, twin = reference.rope_and_cache(
        *(array.astype(mx.float32) for array in (qkv, turns, cache)),
        slots,
        **{name: value.astype(mx.float32) if name != "eps" else value for name, value in norms.items()},
    )
    want = reference.decode_attention(query, twin, plan, scale=0.1)
    mx.eval(cache, want)
    pages = cache + 0
    mx.eval(pages)
    out, pages = metal_kernels.rope_and_attend(qkv, turns, pages, slots, plan, scale=0.1, **norms)
    projected = f"{close(out, want, dtype)}; pages {close(pages, twin, dtype)}"
    rows = qkv.reshape(4, -1, 128)
    query, key, value = rows[:, : 2 * group], rows[:, 2 * group : -2], rows[:, -2:]
    twin, _ = reference.reshape_and_cache(key, value, cache + 0, slots[:4])
    want = reference.decode_attention(query.astype(mx.float32), twin.astype(mx.float32), plan, scale=0.1)
    mx.eval(twin, want)
    out, pages = metal_kernels.write_and_attend(query, key, value, cache, slots, plan, scale=0.1)
    return f"{projected}; as rows {close(out, want, dtype)}; pages {close(pages, twin, dtype)}"


def check_linear(rows: int, bits: int | None) -> str:
    given = mx.random.normal((rows, 1024)).astype(mx.bfloat16)
    norm = mx.random.normal((1024,)).astype(mx.bfloat16)
    weight = (mx.random.normal((2048, 1024)) / 32).astype(mx.bfloat16)
    weights = metal_kernels.LinearWeights(weight)
    exact = metal_kernels.LinearWeights(weight.astype(mx.float32))
    if bits is not None:
        weights = metal_kernels.LinearWeights(*mx.quantize(weight, bits=bits), bits=bits)
        exact = metal_kernels.LinearWeights(
            mx.dequantize(*mx.quantize(weight, bits=bits), bits=bits).astype(mx.float32)
        )
    want = reference.fused_linear(given.astype(mx.float32), exact, norm=norm.astype(mx.float32), eps=1e-6, gated=True)
    return close(metal_kernels.fused_linear(given, weights, norm=norm, eps=1e-6, gated=True), want, mx.bfloat16)


def checks(quick: bool) -> None:
    start = time.perf_counter()
    case("writes in place are seen in order", lambda: str(kernels.writes_in_place()))
    for dtype in FLOAT_DTYPES:
        case(f"write {dtype}", lambda d=dtype: check_write(d))
        case(f"copy {dtype}", lambda d=dtype: check_copy(d))
        case(f"public functions {dtype}", lambda d=dtype: check_public(d))
        for group in (2, 8):
            case(f"written on the way {dtype}, group {group}", lambda d=dtype, g=group: check_on_the_way(d, g))
    for rows in (1, 32):
        for bits in (None, 4, 8):
            case(f"linear, {rows} rows, bits {bits}", lambda r=rows, b=bits: check_linear(r, b))
    bf16 = mx.bfloat16
    case("mixed, several rows", lambda: check_attention(bf16, 128, query_lens=[1, 4, 300, 1]))
    case("window", lambda: check_attention(bf16, 128, sliding_window=1000))
    case("soft cap and sinks", lambda: check_attention(bf16, 128, sinks=True, soft_cap=5.0))
    case("contexts of one range", lambda: check_attention(bf16, 128, sinks=True, seq_lens=(70, 1, 90)))
    for group in (1, 4, 8):
        case(f"group {group}", lambda g=group: check_attention(bf16, 128, group=g))
    for block_size in BLOCK_SIZES:
        case(f"block size {block_size}", lambda b=block_size: check_attention(bf16, 128, b))
    for head_size in (64, 128) if quick else HEAD_SIZES:
        for dtype in FLOAT_DTYPES:
            name = f"decode {dtype} head size {head_size}"
            if time.perf_counter() - start > BUDGET:
                print(f"{name}: not run, out of time", flush=True)
                continue
            case(name, lambda d=dtype, h=head_size: check_attention(d, h))


def seconds(step: Callable[[mx.array], mx.array], value: mx.array, links: int) -> float:
    """Time of one link of a chain: ``step`` makes ``links`` of them, each from the result of the one before.

    Several steps are under way at once, so that the device never waits for the host; the least of five runs.
    """
    mx.eval(step(value), step(value))
    times = []
    for _ in range(5):
        start, last = time.perf_counter(), value
        for _ in range(6):
            last = step(last)
            mx.async_eval(last)
        mx.eval(last)
        times.append((time.perf_counter() - start) / (6 * links))
    return min(times)


def copy_bandwidth() -> float:
    """Bytes per second read and written by an elementwise operation."""
    data = mx.zeros((256, 1024, 1024), mx.bfloat16)
    mx.eval(data)
    return 2 * data.nbytes / seconds(lambda values: values + 1, data, 1)


LAYERS = 28  # of the chain that is timed


def decode_speed(reqs: int, context: int, q_heads: int, kv_heads: int, bandwidth: float) -> str:
    batch, blocks = batch_of([context] * reqs, 16)
    # Four caches take turns, so that a layer's pages are not still in the processor's cache.
    caches = [mx.random.normal((blocks, 2, 16, kv_heads, 128)).astype(mx.bfloat16) for _ in range(4)]
    query = mx.random.normal((reqs, q_heads, 128)).astype(mx.bfloat16)
    slots = mx.array(np.pad(batch.block_table[:, (context - 1) // 16] * 16 + (context - 1) % 16, (0, 8)))
    mx.eval(caches, query, slots)
    decode = kernels.decode_kernel(metal_kernels.target(), query.dtype, query.dtype, 128, 16, q_heads // kv_heads)

    def attend(rows: mx.array, cache: mx.array, token: mx.array | None = None) -> mx.array:
        return kernels.paged_attention(rows, cache, batch, decode, scale=128**-0.5, order_token=token)

    def write_and_attend(rows: mx.array, cache: mx.array) -> mx.array:
        # The rows written come from the layer before, as a model's do.
        own = rows[:, :kv_heads]
        return metal_kernels.write_and_attend(rows, own, own, cache, slots, plan, scale=128**-0.5)[0]

    def write_then_attend(rows: mx.array, cache: mx.array) -> mx.array:
        own = rows[:, :kv_heads]
        return attend(rows, cache, kernels.reshape_and_cache(own, own, cache, slots[:reqs])[1])

    written = mx.random.normal((reqs, (q_heads + 2 * kv_heads) * 128)).astype(mx.bfloat16)
    turns = mx.random.normal((reqs, 128))
    kind = (metal_kernels.target(), query.dtype, query.dtype, 128, 16, q_heads // kv_heads, 128, False)
    on_the_way = kernels.rope_decode_kernel(*kind)
    plan = metal_kernels.plan_decode(
        batch, np.arange(reqs, dtype=np.int32), None, kv_heads * decode.variant.parts * decode.variant.simdgroups
    )
    mx.eval(written, turns)

    def write_on_the_way(rows: mx.array, cache: mx.array) -> mx.array:
        norm = rows.reshape(-1)[:128]  # of the layer before, so that this one follows it
        options = {"scale": 128**-0.5, "q_norm": norm, "k_norm": norm, "eps": 1e-6}
        return kernels.rope_decode(written, turns, cache, slots, plan, on_the_way.variant, **options)

    def chain(layer: Callable[[mx.array, mx.array], mx.array]) -> float:
        def step(rows: mx.array) -> mx.array:
            for index in range(LAYERS):
                rows = layer(rows, caches[index % 4])
            return rows

        return seconds(mx.compile(step), query, LAYERS)

    want = reference.paged_attention(query.astype(mx.float32), caches[0].astype(mx.float32), batch, scale=128**-0.5)
    close(attend(query, caches[0]), want, query.dtype)
    alone, both, apart = chain(attend), chain(write_and_attend), chain(write_then_attend)
    fused = "on the way: not served"
    if isinstance(on_the_way, kernels.Accepted):
        taken = chain(write_on_the_way)
        fused = f"norm, rotation and write on the way {taken * 1e6:.1f} us, {100 * (taken / alone - 1):+.1f} %"
    rate = 2 * reqs * context * kv_heads * 128 * 2 / alone
    return (
        f"{alone * 1e6:.1f} us, {rate / 1e9:.0f} GB/s, {100 * rate / bandwidth:.0f} % of copying; "
        f"with the write {both * 1e6:.1f} us, {100 * (both / alone - 1):+.1f} %, as a launch {apart * 1e6:.1f} us; "
        f"{fused}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="check fewer combinations")
    quick = parser.parse_args().quick
    if metal_kernels.target() == "cpu":
        print("gpu_check needs a GPU: the default device is a CPU")
        return 1
    print(f"MLX {mx.__version__} on {metal_kernels.target()}: {mx.device_info()}")
    checks(quick)
    bandwidths: list[float] = []
    case("copy bandwidth", lambda: bandwidths.append(copy_bandwidth()) or f"{bandwidths[0] / 1e9:.0f} GB/s")
    bandwidth = bandwidths[0] if bandwidths else float("nan")
    for reqs, context, q_heads, kv_heads in (
        (32, 1024, 16, 8),
        (32, 4096, 16, 8),
        (1, 32768, 16, 8),
        (32, 4096, 8, 1),
        (32, 4096, 32, 4),
    ):
        name = f"decode, batch {reqs}, context {context}, {q_heads}/{kv_heads} heads x 128 bf16"
        case(name, lambda a=(reqs, context, q_heads, kv_heads): decode_speed(*a, bandwidth))
    print(f"{failures} failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
