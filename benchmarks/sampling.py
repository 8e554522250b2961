"""What each sampling feature costs per step next to a plain argmax.

Every case is checked against a NumPy reference (float64) before its time is printed.

    python benchmarks/sampling.py --vocab 49152 151936 --batch 8 32
"""

import argparse
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from vllm import SamplingParams

from vllm_metal_plugin.sampling import GrammarRows, Sampler, SamplingState

PROMPT = list(range(100, 600))
OUTPUT = list(range(300, 700))
BITS = 0x5B5B5B5B
Clock = Callable[[], float]


def cases() -> dict[str, dict[str, object]]:
    penalised = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1}
    return {
        "argmax": {"temperature": 0.0},
        "temperature": {"temperature": 0.8},
        "min_p": {"temperature": 1.0, "min_p": 0.05},
        "top_k 40": {"temperature": 1.0, "top_k": 40},
        "top_k 20, top_p .95": {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
        "top_p .9 (peaked)": {"temperature": 0.3, "top_p": 0.9},
        "top_p .9 (flat)": {"temperature": 1.5, "top_p": 0.9},
        "penalties": {"temperature": 0.0, **penalised},
        "logit_bias": {"temperature": 0.0, "logit_bias": {i: 1.0 for i in range(50)}},
        "min_tokens": {
            "temperature": 0.0,
            "min_tokens": 10_000,
            "max_tokens": 20_000,
            "stop_token_ids": [1, 2, 3],
        },
        "allowed_token_ids": {"temperature": 0.0, "allowed_token_ids": list(range(0, 40_000, 3))},
        "grammar": {"temperature": 0.0},
        "logprobs 5": {"temperature": 0.0, "logprobs": 5},
        "everything": {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "logprobs": 5, **penalised},
    }


def adjusted(row: np.ndarray, params: SamplingParams, name: str) -> np.ndarray:
    """Logits after everything that can change a greedy choice, in float64."""
    row = row.astype(np.float64)
    vocab = len(row)
    if name == "grammar":
        bits = np.unpackbits(np.array([BITS], dtype=np.int32).view(np.uint8), bitorder="little")
        row[np.resize(bits, vocab) == 0] = -np.inf
    if params.allowed_token_ids:
        row[np.setdiff1d(np.arange(vocab), params.allowed_token_ids)] = -np.inf
    if params.min_tokens:
        row[params.stop_token_ids] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    seen = np.isin(np.arange(vocab), PROMPT + OUTPUT)
    scale = np.where(seen, params.repetition_penalty, 1.0)
    row = np.where(row > 0, row / scale, row * scale)
    counts = np.bincount(OUTPUT, minlength=vocab)
    return row - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def allowed(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Bool per token: may it be drawn? Ties stay together."""
    if params.temperature < 1e-5:
        return row >= row.max() - 1e-4
    row = row / params.temperature
    keep = np.isfinite(row)
    if params.min_p:
        keep &= row >= row.max() + np.log(params.min_p) - 1e-5
    if 0 < params.top_k < len(row):
        keep &= row >= np.sort(row)[-params.top_k]
    if params.top_p < 1:
        weight = np.where(keep, np.exp(row - row.max()), 0.0)
        order = np.argsort(-weight)
        before = np.cumsum(weight[order]) - weight[order]
        inside = before < params.top_p * weight.sum() * (1 + 1e-6)
        keep &= weight >= weight[order][inside].min()
    return keep


def build(params: SamplingParams, batch: int, vocab: int) -> SamplingState:
    state = SamplingState(batch, vocab, seed=0)
    for row in range(batch):
        state.add(row, str(row), params, PROMPT, OUTPUT)
    return state


def measure(name: str, options: dict[str, object], logits: mx.array, repeats: int, clock: Clock) -> float:
    batch, vocab = logits.shape
    params = SamplingParams(**options)
    state, sampler, rows = build(params, batch, vocab), Sampler(vocab), list(range(batch))
    grammar = None
    if name == "grammar":
        grammar = GrammarRows(np.arange(batch, dtype=np.int32), np.full((batch, -(-vocab // 32)), BITS, np.int32))

    def step() -> mx.array:
        out = sampler(logits, rows, state, grammar)
        mx.eval(out.arrays(), state.arrays())
        return out.token_ids

    tokens = step().tolist()
    host = np.array(logits.astype(mx.float32))
    for row, token in zip(host, tokens, strict=True):
        if not allowed(adjusted(row, params, name), params)[token]:
            raise SystemExit(f"[benchmark] expected a token that {name} allows, got {token}.")
    seconds = []
    for _ in range(repeats):
        start = clock()
        step()
        seconds.append(clock() - start)
    return min(seconds) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, steadier on a shared CPU")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(f"{'device ' + mx.default_device().type.name:24}{'vocab':>8}{'batch':>7}{'ms':>10}{'over argmax':>13}")
    for vocab in arguments.vocab:
        for batch in arguments.batch:
            mx.random.seed(0)
            logits = (mx.random.normal((batch, vocab)) * 3).astype(mx.bfloat16)
            mx.eval(logits)
            base = 0.0
            for name, options in cases().items():
                cost = measure(name, options, logits, arguments.repeats, clock)
                base = base or cost
                print(f"{name:24}{vocab:>8}{batch:>7}{cost:>10.2f}{cost - base:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
