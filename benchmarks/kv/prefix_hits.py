"""What prefix caching gains and costs in vLLM's engine on this machine: time to first token, as ratios of one run.

    python benchmarks/kv/prefix_hits.py [--model DIRECTORY] [--prefix 4096] [--requests 2] [--path paged|contiguous]

Three kinds of prompts to one engine with the cache on: ones that share a long beginning which is cached, and ones that
share nothing; and the latter again to an engine with the cache off. Engines take turns, request by request, and the
first token of a shared prompt is compared with that of the engine that cached nothing. Without --model it is a random
llama of 4 layers, 256 wide. Times are processor time, all threads together: other load hardly changes it. The BLAS has
one thread, because others spend such time waiting.
"""

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import metal_kernels  # noqa: F401  # before mlx.core, to give it a fast BLAS

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

COMMON = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 704, "num_hidden_layers": 4,
    "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
}  # fmt: skip


def random_model(directory: Path, config: dict) -> Path:
    """Write a model with random weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    file = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = file.Model(file.ModelArgs.from_dict(config))
    weights = {
        name: 0.05 * mx.random.normal(a.shape) if a.ndim > 1 else a for name, a in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def first_token(llm, prompt: list[int]) -> tuple[float, int]:
    """Return the processor time to the first token, in seconds, and the token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1)
    start = time.process_time()
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return time.process_time() - start, output.outputs[0].token_ids[0]


def parser(description: str, *, prefix: int, unshared: int) -> argparse.ArgumentParser:
    """Return what both scripts may be told."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path)
    options.add_argument("--prefix", type=int, default=prefix)
    options.add_argument("--suffix", type=int, default=16)
    options.add_argument("--unshared", type=int, default=unshared)
    options.add_argument("--requests", type=int, default=2)
    return options


def compare(name: str, args: argparse.Namespace, config: dict) -> None:
    """Print both ratios of a model: shared beginnings, and prompts that share nothing."""
    import numpy as np
    from vllm import LLM

    model = args.model or random_model(Path(tempfile.mkdtemp()), config)
    longest = max(args.prefix + args.suffix, args.unshared)
    options = {"max_model_len": longest + 240, "max_num_seqs": 4, "max_num_batched_tokens": 512}
    if args.model is None:
        options["skip_tokenizer_init"] = True
    on, off = (
        LLM(model=str(model), kv_cache_memory_bytes=1 << 30, enable_prefix_caching=caching, **options)
        for caching in (True, False)
    )
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(3, 4000, count).tolist()

    shared = tokens(args.prefix)
    for llm in (on, off):
        first_token(llm, tokens(64))
    first_token(on, shared + tokens(args.suffix))
    hits, misses = [], []
    for _ in range(args.requests):
        prompt = shared + tokens(args.suffix)
        hit, token = first_token(on, prompt)
        miss, expected = first_token(off, prompt)
        assert token == expected, "the cached prefix changed the answer"
        hits.append(hit)
        misses.append(miss)
    print(
        f"{name}: first token of {args.prefix} shared + {args.suffix} tokens {min(misses) / min(hits):.1f} x "
        f"sooner ({min(misses):.3f} s -> {min(hits):.3f} s)",
        flush=True,
    )
    with_cache, without = [], []
    for turn in range(4 * args.requests):
        prompt = tokens(args.unshared)
        order = ((on, with_cache), (off, without)) if turn % 2 else ((off, without), (on, with_cache))
        found = {id(times): first_token(llm, prompt) for llm, times in order}
        assert len({token for _, token in found.values()}) == 1, "the cache changed the answer"
        for _, times in order:
            times.append(found[id(times)][0])
    medians = statistics.median(with_cache) / statistics.median(without)
    print(
        f"{name}: unshared prompts of {args.unshared} tokens take {min(with_cache) / min(without):.3f} x "
        f"(medians {medians:.3f}) of the time without the cache: speed {1 / medians:.3f}",
        flush=True,
    )


def main() -> None:
    options = parser(__doc__, prefix=4096, unshared=256)
    options.add_argument("--path", choices=("paged", "contiguous"), default="paged")
    args = options.parse_args()
    os.environ["VLLM_METAL_USE_PAGED_ATTENTION"] = str(int(args.path == "paged"))
    compare(args.path, args, LLAMA)


if __name__ == "__main__":
    main()
