"""What drafts from the prompt (``--speculative-config`` with method ngram) gain or cost, greedy.

    python benchmarks/serving/speculation.py [--rounds 3] [--max-tokens 64] [--drafts 4]

Two servers of the same model, with drafts and without, take turns; their texts have to be equal. Requests that repeat
what is in their prompt are what drafts are for; stories are what they are not for.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from compare import PROMPTS, mlx_directory
from load import run_round
from servers import vllm_serve

RECORD = "name: {0}, colour: green, size: large, place: shelf {1}, state: in use, owner: the second floor\n"
COPIES = [
    "".join(RECORD.format(name, shelf) for shelf in range(1, 9)) + f"name: {name},"
    for name in ("lamp", "chair", "table", "book", "clock", "plant", "phone", "mug")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=4, help="tokens guessed at a time")
    options = parser.parse_args()
    drafts = {"method": "ngram", "num_speculative_tokens": options.drafts, "prompt_lookup_max": 4}
    greedy = {"temperature": 0.0, "max_tokens": options.max_tokens, "extra_body": {"ignore_eos": True}}
    with tempfile.TemporaryDirectory() as scratch:
        path = mlx_directory(Path(scratch))
        log = Path(scratch) / "{}.log"
        with (
            vllm_serve(path, Path(str(log).format("plain"))) as plain_url,
            vllm_serve(path, Path(str(log).format("drafts")), "--speculative-config", json.dumps(drafts)) as url,
        ):
            for kind, prompts in (("copies", COPIES), ("stories", PROMPTS)):
                for streams in (1, 8):
                    ratios = []
                    for turn in range(options.rounds + 1):
                        plain, drafted = (
                            run_round(where, "model", prompts[:streams], **greedy) for where in (plain_url, url)
                        )
                        assert plain.texts == drafted.texts, (plain.texts, drafted.texts)
                        if turn:  # the first turn warms up
                            ratios.append(drafted.tokens_per_s / plain.tokens_per_s)
                        print(f"{kind}, {streams}: {turn}/{options.rounds}", end="\r", file=sys.stderr, flush=True)
                    print(f"{kind}, {streams} streams: {statistics.median(ratios):.2f} x without drafts", flush=True)


if __name__ == "__main__":
    main()
