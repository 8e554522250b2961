"""Decodes hybrid and latent models on a GPU, without vLLM, beside mlx-lm's BatchGenerator in the same run.

The models have random weights and the shapes that ``hybrid_models`` names. Before anything is timed, hidden rows of
the compiled decode step and of the model's own modules, after a prompt and some tokens of several requests, are
compared with float32's. Run it on a machine with an NVIDIA GPU or on a Mac:
``python benchmarks/kernels/hybrid_loop.py``. ``--plain`` also times the model's own modules over the paged cache,
uncompiled; ``--only lfm2`` runs one model, ``--batch 8`` one batch.
"""

import argparse
import sys
from itertools import pairwise
from typing import Any

import metal_kernels  # isort: skip  before MLX: it sets MLX's limits
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from decode_loop import Loop, mlx_lm_rate, timed, tokens_per_second
from hybrid_models import MODELS

from metal_kv import AttentionMetadata, CacheGroup, CacheLayout, KVCachePool, unify_page_sizes
from metal_kv.spec import AttentionSpec, LatentSpec, RecurrentStateSpec
from metal_models import PagedModel
from metal_models.registry import build

BATCHES = (1, 8, 32)
BLOCK_SIZE = 16
STEPS_IN_ALL = 240


def random_model(config: dict[str, Any]) -> nn.Module:
    mx.random.seed(0)
    module = build(config)
    for path, router in module.named_modules():
        # mlx-lm makes routers of zeros, with which all rows would choose the same experts.
        if path.endswith(".gate") and not isinstance(router, nn.Linear):
            router.weight = mx.random.normal(router.weight.shape) * router.weight.shape[1] ** -0.5
    module.set_dtype(mx.bfloat16)
    mx.eval(module.parameters())
    module.eval()
    return module


def vocab_size(config: dict[str, Any]) -> int:
    return int(config.get("text_config", config)["vocab_size"])


class HybridLoop(Loop):
    """Requests that decode greedily; pages of all kinds of layers lie in shared slabs."""

    def __init__(self, model: PagedModel, reqs: int, context: int, steps: int) -> None:
        self.model = model
        self.vocab_size = vocab_size(model.config)
        specs = model.kv_cache_specs(BLOCK_SIZE)
        states_alone = all(isinstance(spec, RecurrentStateSpec) for spec in specs.values())
        specs = unify_page_sizes(specs, state_block_size=context + steps if states_alone else None)
        by_kind: dict[Any, list[str]] = {}
        alike = len({spec.page_size_bytes for spec in specs.values()}) == 1
        for name, spec in specs.items():
            by_kind.setdefault(spec if alike else None, []).append(name)
        self.groups = []
        for names in by_kind.values():
            kinds = tuple(specs[name] for name in names)
            rows = isinstance(kinds[0], AttentionSpec | LatentSpec)
            self.groups.append(CacheGroup(tuple(names), kinds, BLOCK_SIZE if rows else None))
        blocks = [-(-(context + steps) // group.block_size) for group in self.groups]
        ids = np.random.default_rng(0).permutation(reqs * sum(blocks)).astype(np.int32) + 1
        bounds = np.cumsum([0, *(reqs * count for count in blocks)])
        self.tables = [ids[start:end].reshape(reqs, -1) for start, end in pairwise(bounds)]
        self.pool = KVCachePool(CacheLayout.from_groups(self.groups, len(ids) + 1))
        self.seq_lens = np.full(reqs, context, np.int32)
        self.starts = np.arange(reqs + 1, dtype=np.int32)
        self.token_ids = mx.array(np.random.default_rng(0).integers(1, self.vocab_size, reqs).astype(np.int32))
        mx.eval(self.token_ids)

    def metadata(
        self, starts: np.ndarray | None = None, seq_lens: np.ndarray | None = None
    ) -> list[AttentionMetadata]:
        """Return what a step needs to know: by default the next one."""
        starts = self.starts if starts is None else starts
        seq_lens = self.seq_lens + 1 if seq_lens is None else seq_lens
        metadata: list[AttentionMetadata] = []
        for group, table in zip(self.groups, self.tables, strict=True):
            of_group = AttentionMetadata.build(
                starts,
                seq_lens,
                table,
                group.block_size,
                kernel_block_size=group.kernel_block_size,
                keeps_rows=group.keeps_rows,
                like=metadata[0] if metadata else None,
            )
            metadata.append(of_group)
        return metadata

    def prefill(self, prompts: np.ndarray) -> None:
        """Compute prompts ``[requests, length]``."""
        reqs, length = prompts.shape
        metadata = self.metadata(length * self.starts, np.full(reqs, length, np.int32))
        mx.eval(self.model.forward(mx.array(prompts.reshape(-1)), metadata, self.pool), self.pool.arrays())
        self.seq_lens = np.full(reqs, length, np.int32)

    def hidden(self, token_ids: np.ndarray) -> mx.array:
        """Compute a step of given tokens."""
        hidden = self.model.forward(mx.array(token_ids), self.metadata(), self.pool)
        mx.eval(hidden, self.pool.arrays())
        self.seq_lens = self.seq_lens + 1
        return hidden.astype(mx.float32)


def check(module: nn.Module, config: dict[str, Any], reqs: int) -> str:
    """Compare compiled steps, the same on the model's own modules, and those in float32 from the same weights."""
    exact = random_model(config)
    exact.set_dtype(mx.float32)
    models = (
        PagedModel(exact, config, compiled_decode=False),
        PagedModel(module, config, compiled_decode=False),
        PagedModel(module, config, compiled_decode=True),
    )
    ids = np.random.default_rng(1).integers(1, vocab_size(config), (reqs, 24)).astype(np.int32)
    hidden = []
    for model in models:
        loop = HybridLoop(model, reqs, 24, BLOCK_SIZE)
        loop.prefill(ids[:, :15])
        hidden.append(mx.concatenate([loop.hidden(ids[:, at]) for at in range(15, 24)]))
    exact_norm = mx.linalg.norm(hidden[0])
    plain_error, compiled_error = ((mx.linalg.norm(rows - hidden[0]) / exact_norm).item() for rows in hidden[1:])
    if not compiled_error < 1.2 * plain_error:
        raise AssertionError(
            f"from float32, the compiled steps are {compiled_error:.4f} away, the plain ones {plain_error:.4f}"
        )
    return f"hidden rows are {compiled_error:.4f} from float32's, the plain modules' {plain_error:.4f}"


def run_model(name: str, options: argparse.Namespace) -> None:
    config = MODELS[name]
    module = random_model(config)
    print(f"{name}: {check(module, config, 32)}", flush=True)  # of few rows, one whose experts differ weighs much
    compiled = PagedModel(module, config, compiled_decode=True)
    plain = PagedModel(module, config, compiled_decode=False)
    for reqs in BATCHES if options.batch is None else (options.batch,):
        for label, model in (("compiled", compiled), ("plain", plain)):
            if label == "compiled" or options.plain:
                loop = HybridLoop(model, reqs, options.context, STEPS_IN_ALL)
                tokens_per_second(loop, reqs)  # compiles what the next ones use
                loop.seq_lens = np.full(reqs, options.context, np.int32)
                print(f"{name} {reqs} x {options.context}: {label} {tokens_per_second(loop, reqs)}", flush=True)
                del loop
        if options.mlx_lm:
            rate = mlx_lm_rate(module, reqs, options.context, vocab_size(config))
            print(f"{name} {reqs} x {options.context}: mlx-lm {rate:8.0f} tok/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(MODELS), help="models, of those in MODELS")
    parser.add_argument("--batch", type=int, help="one batch size")
    parser.add_argument("--context", type=int, default=256, help="tokens of each request")
    parser.add_argument("--plain", action="store_true", help="also time the model's own modules")
    parser.add_argument("--no-mlx-lm", dest="mlx_lm", action="store_false", help="leave mlx-lm out")
    options = parser.parse_args()
    if metal_kernels.target() == "cpu":
        print("hybrid_loop needs a GPU: the default device is a CPU")
        return 1
    print(f"MLX {mx.__version__} on {metal_kernels.target()}: {mx.device_info()}")
    return 0 if all([timed(lambda n=name: run_model(n, options)) for name in options.only]) else 1


if __name__ == "__main__":
    sys.exit(main())
