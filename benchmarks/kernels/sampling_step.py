"""What sampling adds to a decode step on a GPU, feature by feature: whole steps of decode_loop's model and a sampler.

The plugin's own sampler runs, without vLLM. Tokens of each feature's first step are checked against float64 before it
is timed. Run it on a machine with an NVIDIA GPU or on a Mac: ``python benchmarks/kernels/sampling_step.py``. ``--batch
32`` runs one batch size, ``--only temperature`` the features whose names hold a word.
"""

import argparse
import sys
from dataclasses import dataclass, field
from typing import Any

import metal_kernels  # isort: skip  before MLX: it sets MLX's limits
import mlx.core as mx
import numpy as np
from decode_loop import CONFIG, Loop, random_model, timed

from metal_models import PagedModel
from vllm_metal_plugin.sampling import GrammarRows, Sampler, SamplingState

BATCHES, CONTEXT, WARM_UP, STEPS = (1, 32, 128), 512, 10, 60
PROMPT, OUTPUT = range(100, 600), range(300, 700)
BITS = 0x5B5B5B5B


@dataclass
class Params:
    """What the sampler reads of vLLM's ``SamplingParams``."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    seed: int | None = None
    min_tokens: int = 0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    logprob_token_ids: list[int] | None = None
    structured_outputs: Any = None
    all_stop_token_ids: set[int] = field(default_factory=set)

    @property
    def num_logprobs(self) -> int | None:
        """Return how many log probabilities are asked for."""
        return self.logprobs


PENALISED = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1}
FEATURES: dict[str, dict[str, Any]] = {
    "argmax": {},
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "top_k 40": {"temperature": 1.0, "top_k": 40},
    "top_k 20, top_p .95": {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    "top_k 20, top_p .95, min_p .02": {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    "top_k 1000": {"temperature": 1.0, "top_k": 1000},
    "top_p .9 (peaked)": {"temperature": 0.2, "top_p": 0.9},
    "top_p .9 (flat)": {"temperature": 1.5, "top_p": 0.9},
    "penalties": {"temperature": 0.0, **PENALISED},
    "penalties, top_k 20, top_p .95": {"temperature": 0.7, "top_k": 20, "top_p": 0.95, **PENALISED},
    "grammar": {"temperature": 0.0},
    "grammar, temperature": {"temperature": 0.8},
    "logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "logit_bias": {"temperature": 0.0, "logit_bias": dict.fromkeys(range(50), 1.0)},
}


class SampledLoop(Loop):
    """Requests that decode by the plugin's sampler; ``feature`` "argmax" takes the largest logit without it."""

    def __init__(self, model: PagedModel, reqs: int, feature: str) -> None:
        super().__init__(model, reqs, CONTEXT, WARM_UP + STEPS + 2)
        self.params = Params(**FEATURES[feature])
        self.sampler = None if feature == "argmax" else Sampler(model.vocab_size)
        self.state = SamplingState(reqs, model.vocab_size, seed=0)
        self.grammar = None
        if self.sampler is not None:
            for row in range(reqs):
                self.state.add(row, str(row), self.params, list(PROMPT), list(OUTPUT))  # type: ignore[arg-type]
        if feature.startswith("grammar"):
            bits = np.full((reqs, -(-model.vocab_size // 32)), BITS, np.int32)
            self.grammar = GrammarRows(np.arange(reqs, dtype=np.int32), bits)
        # Random weights make flat logits: these are as spread out as a language model's.
        self.factor = mx.array(3.0, mx.bfloat16)
        self.rows = list(range(reqs))

    def logits(self) -> mx.array:
        """Return the logits of the next step."""
        hidden = self.model.forward(self.token_ids, self.metadata(), self.pool)
        return self.model.compute_logits(hidden) * self.factor

    def dispatch(self) -> mx.array:
        """Start a step; returns its tokens."""
        logits = self.logits()
        if self.sampler is None:
            self.token_ids = mx.argmax(logits, axis=-1).astype(mx.int32)
            mx.async_eval(self.token_ids)
        else:
            out = self.sampler(logits, self.rows, self.state, self.grammar)
            self.token_ids = out.token_ids
            mx.async_eval(out.arrays(), self.state.arrays())
        self.seq_lens = self.seq_lens + 1
        return self.token_ids

    def check(self) -> None:
        """Run a step and require that each of its tokens may be drawn."""
        logits = self.logits()
        mx.eval(logits)
        assert self.sampler is not None
        tokens = self.sampler(logits, self.rows, self.state, self.grammar).token_ids
        mx.eval(tokens, self.state.arrays())
        for row, token in zip(np.array(logits.astype(mx.float32)), tokens.tolist(), strict=True):
            keep = may_be_drawn(adjusted(row, self.params, self.grammar is not None), self.params)
            if not keep[token]:
                raise AssertionError(f"expected one of {keep.sum()} tokens, got {token}")


def adjusted(row: np.ndarray, params: Params, grammar: bool) -> np.ndarray:
    """Return logits after everything that can change a greedy choice, in float64."""
    row, vocab = row.astype(np.float64), len(row)
    if grammar:
        bits = np.unpackbits(np.array([BITS], dtype=np.int32).view(np.uint8), bitorder="little")
        row[np.resize(bits, vocab) == 0] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    seen = np.isin(np.arange(vocab), [*PROMPT, *OUTPUT])
    scale = np.where(seen, params.repetition_penalty, 1.0)
    row = np.where(row > 0, row / scale, row * scale)
    counts = np.bincount(list(OUTPUT), minlength=vocab)
    return np.asarray(row - params.frequency_penalty * counts - params.presence_penalty * (counts > 0))


def may_be_drawn(row: np.ndarray, params: Params) -> np.ndarray:
    """Return a bool per token; ties stay together."""
    if params.temperature < 1e-5:
        return row >= row.max() - 1e-4
    row = row / params.temperature
    keep = np.isfinite(row)
    if params.min_p:
        keep &= row >= row.max() + np.log(params.min_p) - 1e-5
    if 0 < params.top_k < len(row):
        keep &= row >= np.sort(row)[-params.top_k] - 1e-5
    if params.top_p < 1:
        weight = np.where(keep, np.exp(row - row.max()), 0.0)
        order = np.argsort(-weight)
        before = np.cumsum(weight[order]) - weight[order]
        keep &= weight >= weight[order][before < params.top_p * weight.sum() * (1 + 1e-6)].min() * (1 - 1e-5)
    return keep


def run_feature(model: PagedModel, reqs: int, feature: str) -> None:
    if feature != "argmax":
        SampledLoop(model, reqs, feature).check()
    loop = SampledLoop(model, reqs, feature)
    loop.run(WARM_UP)
    seconds, busy = loop.run(STEPS)
    step, host = (1e3 * total / STEPS for total in (seconds, busy))
    print(f"{reqs:4} x {CONTEXT}  {feature:32}{step:7.3f} ms a step, host {host:.2f} ms", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--only", default="", help="features whose names hold this")
    options = parser.parse_args()
    print(f"MLX {mx.__version__} on {metal_kernels.target()}: {mx.device_info()}")
    model = PagedModel(random_model(None), CONFIG)
    features = [name for name in FEATURES if options.only in name or name in ("argmax", "greedy")]
    passed = [timed(lambda r=reqs, f=name: run_feature(model, r, f)) for reqs in options.batch for name in features]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
