"""Decodes hybrid and latent models on a GPU, without vLLM, beside mlx-lm's BatchGenerator in the same run.

The models have random weights and the shapes that ``MODELS`` names. Before anything is timed, hidden rows of the
fused decode step and of the model's own modules, after a prompt and some tokens of several requests, are compared
with float32's. Run it on a machine with an NVIDIA GPU or on a Mac: ``python benchmarks/kernels/hybrid_loop.py``.
``--plain`` also times the model's own modules over the paged cache; ``--only lfm2`` runs one model, ``--batch 8`` one
batch.
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

from metal_kv import AttentionMetadata, CacheGroup, CacheLayout, KVCachePool, unify_page_sizes
from metal_kv.spec import AttentionSpec, LatentSpec, RecurrentStateSpec
from metal_models import PagedModel
from metal_models.registry import build

_COMMON = {"vocab_size": 65536, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_GATED_DELTA = _COMMON | {
    "hidden_size": 2048,
    "head_dim": 256,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_EXPERTS = {"num_experts": 64, "num_experts_per_tok": 10, "moe_intermediate_size": 512}
_LATENT = _COMMON | {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "rope_scaling": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3.5": {  # as Qwen3.5-2B, dense
        "model_type": "qwen3_5",
        "text_config": _GATED_DELTA
        | {
            "model_type": "qwen3_5",
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "linear_num_value_heads": 16,
            "intermediate_size": 6144,
            "rope_parameters": None,
        },
    },
    "qwen3-next": _GATED_DELTA  # a quarter of its layers, an eighth of its experts
    | _EXPERTS
    | {
        "model_type": "qwen3_next",
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "linear_num_value_heads": 32,
        "intermediate_size": 5120,
        "shared_expert_intermediate_size": 512,
    },
    "lfm2": _COMMON  # as LFM2-1.2B
    | {
        "model_type": "lfm2",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 2048,
        "block_ff_dim": 12288,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    },
    "mamba2": _COMMON  # as Mamba2-1.3B
    | {
        "model_type": "mamba2",
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 48,
        "num_heads": 64,
        "head_dim": 64,
        "state_size": 128,
        "conv_kernel": 4,
        "n_groups": 1,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, 1e9],
        "time_step_rank": "auto",
    },
    "granite-hybrid": _COMMON  # as Granite 4.0 H Micro
    | {
        "model_type": "granitemoehybrid",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "shared_intermediate_size": 8192,
        "num_hidden_layers": 40,
        "layer_types": [("attention" if layer in (5, 15, 25, 35) else "mamba") for layer in range(40)],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attention_bias": False,
        "position_embedding_type": "nope",
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 64,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    },
    "latent": _LATENT | {"num_hidden_layers": 24, "n_routed_experts": None},
    "latent-experts": _LATENT | {"num_hidden_layers": 12, "n_routed_experts": 64, "first_k_dense_replace": 1},
}
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
        for name, spec in specs.items():
            by_kind.setdefault(spec, []).append(name)
        self.groups = [
            CacheGroup(tuple(names), spec, BLOCK_SIZE if isinstance(spec, AttentionSpec | LatentSpec) else None)
            for spec, names in by_kind.items()
        ]
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
        return [
            AttentionMetadata.build(
                self.starts if starts is None else starts,
                self.seq_lens + 1 if seq_lens is None else seq_lens,
                table,
                group.block_size,
                kernel_block_size=group.kernel_block_size,
                keeps_rows=group.keeps_rows,
            )
            for group, table in zip(self.groups, self.tables, strict=True)
        ]

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
    """Compare fused steps, the same on the model's own modules, and those in float32 from the same weights."""
    exact = random_model(config)
    exact.set_dtype(mx.float32)
    models = (
        PagedModel(exact, config, fused_decode=False),
        PagedModel(module, config, fused_decode=False),
        PagedModel(module, config),
    )
    ids = np.random.default_rng(1).integers(1, vocab_size(config), (reqs, 24)).astype(np.int32)
    hidden = []
    for model in models:
        loop = HybridLoop(model, reqs, 24, BLOCK_SIZE)
        loop.prefill(ids[:, :15])
        hidden.append(mx.concatenate([loop.hidden(ids[:, at]) for at in range(15, 24)]))
    exact_norm = mx.linalg.norm(hidden[0])
    plain_error, fused_error = ((mx.linalg.norm(rows - hidden[0]) / exact_norm).item() for rows in hidden[1:])
    if not fused_error < 1.2 * plain_error:
        raise AssertionError(
            f"from float32, the fused steps are {fused_error:.4f} away, the plain ones {plain_error:.4f}"
        )
    return f"hidden rows are {fused_error:.4f} from float32's, the plain modules' {plain_error:.4f}"


def run_model(name: str, options: argparse.Namespace) -> None:
    config = MODELS[name]
    module = random_model(config)
    print(f"{name}: {check(module, config, 32)}", flush=True)  # of few rows, one whose experts differ weighs much
    fused = PagedModel(module, config)
    plain = PagedModel(module, config, fused_decode=False)
    for reqs in BATCHES if options.batch is None else (options.batch,):
        for label, model in (("fused", fused), ("plain", plain)):
            if label == "fused" or options.plain:
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
