"""What a start costs when the model is on this machine: in fresh processes, with the hub's server counting requests.

    python benchmarks/hub/warm_resolve.py [--shards 40] [--rounds 5]

Three figures, the least of the rounds: importing the resolver, resolving (a stat of every file), and resolving with
`update="check"`, which starts the fetching process for one request.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_metal_hub.resolver import RESOLVED, resolve
from vllm_metal_hub.testing import FaultServer

PROGRAM = """
import json, sys, time
started = time.perf_counter()
from vllm_metal_hub.resolver import resolve
imported = time.perf_counter()
resolve(sys.argv[1], update=sys.argv[2])
print(json.dumps([imported - started, time.perf_counter() - imported]))
"""


def least_ms(ref: str, update: str, rounds: int) -> list[float]:
    """Milliseconds to import and to resolve, each the least of ``rounds`` fresh processes."""
    command = [sys.executable, "-c", PROGRAM, ref, update]
    env = os.environ | {RESOLVED: "{}"}
    times = [
        json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout) for _ in range(rounds)
    ]
    return [min(column) * 1e3 for column in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    names = [f"model-{i + 1:05}-of-{args.shards:05}.safetensors" for i in range(args.shards)]
    index = json.dumps({"weight_map": {name: name for name in names}}).encode()
    files = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors.index.json": index}
    with tempfile.TemporaryDirectory() as scratch, FaultServer() as hub:
        os.environ.update(hub.environment(Path(scratch)) | {"VLLM_METAL_HUB_TIMEOUT": "10"})
        hub.add("org/model", files | {name: name.encode() * 1000 for name in names})
        for scheme in ("hf", "ms"):
            ref = f"{scheme}://org/model"
            resolve(ref)
            hub.forget()
            importing, warm = least_ms(ref, "never", args.rounds)
            asked = len(hub.requests)
            _, check = least_ms(ref, "check", args.rounds)
            print(
                f"{scheme}: import {importing:.0f} ms, resolve {warm:.1f} ms with {asked} requests, "
                f"check {check:.0f} ms with {(len(hub.requests) - asked) / args.rounds:.0f} requests"
            )


if __name__ == "__main__":
    main()
