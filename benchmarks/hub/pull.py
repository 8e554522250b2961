"""A cold pull over loopback against a plain sequential copy with hashing of the same bytes, in one run.

    python benchmarks/hub/pull.py [--gigabytes 2] [--shards 4] [--rounds 3] [--directory DIR]

The copy reads each file in blocks of 4 MiB, feeds SHA-256, writes the block and syncs the file, which is what any
verified copy of the bytes has to do. The pull is `resolve` of the same files from a server of this machine: its time
includes the start of the fetching process, the listing, and every digest. Rounds alternate; the ratio is of the best
of each. Give a directory on the disk where models are kept; the page cache is warm for both.
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from pathlib import Path

from vllm_metal_hub.resolver import RESOLVED, resolve
from vllm_metal_hub.testing import FaultServer
from vllm_metal_hub.testing.repository import git_sha1, sha256

BLOCK = 1 << 22


def shards(nbytes: int, count: int) -> dict[str, bytes]:
    """A repository of random weights: its files by path."""
    files = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {n: n for n in names}}).encode()
    for name in names:
        size = nbytes // count
        header = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        files[name] = struct.pack("<Q", len(header)) + header + os.urandom(size)
    return files


def copy_s(source: Path, target: Path) -> float:
    """Seconds to copy every file of ``source`` one after another, hashed and synced."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    started = time.perf_counter()
    for path in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as reader, (target / path.name).open("wb", buffering=0) as writer:
            while block := reader.read(BLOCK):
                digest.update(block)
                writer.write(block)
            os.fsync(writer.fileno())
    return time.perf_counter() - started


def pull_s(scheme: str, home: Path, hub: FaultServer) -> float:
    """Seconds for a cold ``resolve``."""
    shutil.rmtree(home, ignore_errors=True)
    os.environ.update(hub.environment(home) | {RESOLVED: "{}", "VLLM_METAL_HUB_TIMEOUT": "10"})
    started = time.perf_counter()
    snapshot = resolve(f"{scheme}://org/large")
    spent = time.perf_counter() - started
    assert snapshot.check == "hash"
    assert snapshot.fetched_bytes == snapshot.nbytes
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args()
    files = shards(int(args.gigabytes * 1e9), args.shards)
    nbytes = sum(map(len, files.values()))
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch, FaultServer() as hub:
        root = Path(scratch)
        (root / "source").mkdir()
        for name, content in files.items():
            (root / "source" / name).write_bytes(content)
            sha256(content), git_sha1(content)  # the server keeps them: its own hashing is no part of a pull
        hub.add("org/large", files)
        times: dict[str, list[float]] = {"copy": [], "hf": [], "ms": []}
        for _ in range(args.rounds):
            times["copy"].append(copy_s(root / "source", root / "copy"))
            shutil.rmtree(root / "copy")
            for scheme in ("hf", "ms"):
                times[scheme].append(pull_s(scheme, root / "home", hub))
                shutil.rmtree(root / "home")
    print(f"{nbytes / 1e9:.2f} GB in {args.shards} files, best of {args.rounds}")
    for name, label in (("copy", "copy with hashing"), ("hf", "pull, Hugging Face"), ("ms", "pull, ModelScope")):
        best = min(times[name])
        print(
            f"{label:20} {best:6.2f} s  {nbytes / best / 1e6:7.0f} MB/s  {min(times['copy']) / best:5.2f} of the copy"
        )


if __name__ == "__main__":
    main()
