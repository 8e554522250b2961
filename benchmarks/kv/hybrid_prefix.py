"""What prefix caching gains and costs where layers keep a recurrent state: ``prefix_hits.py`` with a hybrid model.

    python benchmarks/kv/hybrid_prefix.py [--kind conv|delta] [--model DIRECTORY] [--prefix 2048] [--requests 2]

The engine with the cache on keeps the state at the end of every block ("align"), and a prompt that shares its
beginning goes on from the last of them. For that vLLM computes the tokens after a prompt's last full block in a step
of their own, which is what the cache costs prompts that share nothing. The random models are of 4 layers: ``conv``,
512 wide, is LFM2's kind, two short convolutions to two layers of attention; ``delta``, 256 wide, is Qwen3-Next's,
three of Gated DeltaNet to one, whose prompts take long on a CPU.
"""

import os

from prefix_hits import COMMON, compare, parser

CONV = COMMON | {
    "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 4, "num_attention_heads": 8, "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3,
    "block_dim": 512, "block_ff_dim": 1408,
    "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "rope_theta": 1e6,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}  # fmt: skip
DELTA = COMMON | {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "intermediate_size": 704,
    "num_hidden_layers": 4, "head_dim": 64, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 256, "mlp_only_layers": [],
    "moe_intermediate_size": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "partial_rotary_factor": 0.5,
    "full_attention_interval": 4,
}  # fmt: skip


def main() -> None:
    options = parser(__doc__, prefix=2048, unshared=2048)
    options.add_argument("--kind", choices=("conv", "delta"), default="conv")
    args = options.parse_args()
    os.environ["VLLM_METAL_USE_PAGED_ATTENTION"] = "1"
    compare(args.kind, args, CONV if args.kind == "conv" else DELTA)


if __name__ == "__main__":
    main()
