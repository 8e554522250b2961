"""What sampling, penalties, structured output and logprobs cost at batch 8, relative to greedy.

    python benchmarks/serving/features.py [--rounds 3] [--max-tokens 64]

The kinds of request take turns in one run against one server; only the ratios are meant to be quoted.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare import PROMPTS, mlx_directory
from load import run_round
from servers import vllm_serve

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled (temperature, top-k, top-p, min-p)": {
        "temperature": 0.8,
        "top_p": 0.95,
        "extra_body": {"top_k": 40, "min_p": 0.01},
    },
    "sampled (temperature, top-p)": {"temperature": 1.0, "top_p": 0.9},
    "seeded": {"temperature": 0.8, "seed": 7},
    "penalised": {
        "temperature": 0.8,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "extra_body": {"repetition_penalty": 1.1},
    },
    "structured (regex)": {
        "temperature": 0.0,
        "extra_body": {"structured_outputs": {"regex": "[a-z ]{2000}"}},
    },
    "logprobs 5": {"temperature": 0.0, "logprobs": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        path = mlx_directory(Path(scratch))
        with vllm_serve(path, Path(scratch) / "vllm.log") as url:
            for turn in range(options.rounds + 1):
                for kind, fields in KINDS.items():
                    body = {"ignore_eos": True, **fields.get("extra_body", {})}
                    plain = {key: value for key, value in fields.items() if key != "extra_body"}
                    result = run_round(url, "model", PROMPTS, max_tokens=options.max_tokens, extra_body=body, **plain)
                    assert result.tokens == len(PROMPTS) * options.max_tokens, (kind, result)
                    if turn:  # the first turn warms up
                        speeds[kind].append(result.tokens_per_s)
                    print(f"round {turn}/{options.rounds}: {kind}", end="\r", file=sys.stderr, flush=True)
                print_table(speeds)


def print_table(speeds: dict[str, list[float]]) -> None:
    """Print the medians of the rounds so far."""
    rounds = len(speeds["greedy"])
    if not rounds:
        return
    print(f"after {rounds} rounds")
    base = statistics.median(speeds["greedy"])
    for kind, values in speeds.items():
        speed = statistics.median(values)
        print(f"{kind:<44} {speed:8.1f} tokens/s {speed / base:6.2f} of greedy", flush=True)


if __name__ == "__main__":
    main()
