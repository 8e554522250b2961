"""What each GGUF architecture is called in mlx-lm and in Hugging Face's config.json: a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metal_models.errors import UnsupportedModelError
from metal_models.gguf.file import GGUFFile

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_SILU = {"hidden_act": "silu"}


def _experts(block: str) -> dict[str, str]:
    return {
        "ffn_gate_inp": f"{block}.gate",
        "ffn_gate_exps": f"{block}.switch_mlp.gate_proj",
        "ffn_up_exps": f"{block}.switch_mlp.up_proj",
        "ffn_down_exps": f"{block}.switch_mlp.down_proj",
    }


@dataclass(frozen=True)
class Architecture:
    """How to read one architecture's files.

    Attributes:
        model_type: mlx-lm's and Hugging Face's name.
        model_class: Hugging Face's class, for config.json's ``architectures``.
        layers: Tensor name within ``blk.N`` to module path within ``model.layers.N``.
        keys: Config key to metadata key, beyond those that every architecture has; absent ones are left out.
        constants: Config entries that the architecture fixes and the file does not hold.
        interleaved_rope: llama.cpp reordered the rows of q and k for its own kind of RoPE.
        norm_offset: What llama.cpp added to the weights of the norms.
        wide_range: Activations overflow float16.
        tied: The output layer always is the embedding.
    """

    model_type: str
    model_class: str
    layers: Mapping[str, str]
    keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    wide_range: bool = False
    tied: bool = False

    def module_of(self, name: str) -> str | None:
        """Return the module path that a tensor's name (less ``.weight`` or ``.bias``) stands for, or None."""
        if name in _TOP:
            return _TOP[name]
        block, _, rest = name.removeprefix("blk.").partition(".")
        if not name.startswith("blk.") or rest not in self.layers:
            return None
        return f"model.layers.{block}.{self.layers[rest]}"


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GEMMA_KEYS = {"sliding_window": "attention.sliding_window"}

ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _ATTENTION | _MLP, constants=_SILU, interleaved_rope=True),
    # Mixtral's files call themselves llama.
    "llama (experts)": Architecture(
        "mixtral",
        "MixtralForCausalLM",
        _ATTENTION | _experts("block_sparse_moe"),
        keys={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        constants=_SILU,
        interleaved_rope=True,
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _ATTENTION | _MLP, constants=_SILU),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _ATTENTION | _QK_NORMS | _MLP, constants=_SILU),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _ATTENTION | _QK_NORMS | _experts("mlp"),
        keys={
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        constants=_SILU | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gemma": Architecture(
        "gemma",
        "GemmaForCausalLM",
        _ATTENTION | _MLP,
        constants=_GELU,
        norm_offset=1.0,
        wide_range=True,
        tied=True,
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _ATTENTION | _GEMMA_NORMS | _MLP,
        keys=_GEMMA_KEYS
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        constants=_GELU,
        norm_offset=1.0,
        wide_range=True,
        tied=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _ATTENTION | _GEMMA_NORMS | _QK_NORMS | _MLP,
        keys=_GEMMA_KEYS,
        constants=_GELU | {"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        norm_offset=1.0,
        wide_range=True,
        tied=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        _ATTENTION | _MLP | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        keys=_GEMMA_KEYS,
        constants=_SILU,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        _ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        keys={"norm_epsilon": "attention.layer_norm_epsilon"},
        constants={"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
    ),
}


def architecture_of(file: GGUFFile) -> Architecture:
    """Return the table's entry for a file.

    Raises:
        UnsupportedModelError: The file's architecture is not in the table.
    """
    name = file.architecture
    if name == "llama" and file.get("expert_count", 0):
        name = "llama (experts)"
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(key for key in ARCHITECTURES if " " not in key))
        raise UnsupportedModelError(
            file.architecture, f"GGUF files can be read for {known}; {file.path} is of none of them"
        )
    return ARCHITECTURES[name]
