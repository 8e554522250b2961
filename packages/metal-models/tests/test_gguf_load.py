import importlib
import logging

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from transformers import AutoConfig

from metal_models.errors import CheckpointError
from metal_models.gguf import load_gguf

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 64, 2, 4, 2, 96, 128
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": MLP,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "rope_theta": 20000.0,
    "max_position_embeddings": 512,
}
# gguf architecture: (model_type, config beyond COMMON, metadata beyond what COMMON gives)
CASES = {
    "llama": ("llama", {"tie_word_embeddings": True, "head_dim": 16}, {}),
    "llama untied": ("llama", {"tie_word_embeddings": False, "head_dim": 16}, {}),
    "llama experts": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 32}, {"attention.key_length": 32}),
    "qwen3moe": (
        "qwen3_moe",
        {
            "tie_word_embeddings": False,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
        {
            "attention.key_length": 32,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
        },
    ),
    "gemma": ("gemma", {"head_dim": 32}, {"attention.key_length": 32}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "attention.key_length": 32,
            "attention.sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0,
        },
        {"attention.key_length": 32, "attention.sliding_window": 8},
    ),
    "phi3": (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "original_max_position_embeddings": 128,
            "rope_scaling": {"type": "longrope", "long_factor": [2.0, 3, 4, 5], "short_factor": [1.0] * 4},
        },
        {"rope.dimension_count": 8, "rope.scaling.original_context_length": 128},
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-6}, {"attention.layer_norm_epsilon": 1e-6}),
}
# Names of stacked experts in gguf's table of Hugging Face names.
EXPERTS = {
    "block_sparse_moe.switch_mlp.gate_proj": "block_sparse_moe.experts.w1",
    "block_sparse_moe.switch_mlp.up_proj": "block_sparse_moe.experts.w3",
    "block_sparse_moe.switch_mlp.down_proj": "block_sparse_moe.experts.w2",
    "mlp.switch_mlp": "mlp.experts",
}
METADATA = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}


def reference(case):
    """mlx-lm's own model of a case with random float32 weights, and the weights by name."""
    model_type, config, _ = CASES[case]
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": model_type, **COMMON, **config}))
    if model_type == "gemma3_text":
        model.sanitize({})
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(scale=0.3, size=value.shape).astype(np.float32) + ("norm.weight" in name)
        for name, value in tree_flatten(model.parameters())
    }
    return model, weights


def gguf_names(case, weights):
    """The converter's name for each parameter, from the gguf library's table."""
    arch = case.split()[0]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, 8)
    names = {}
    for name in weights:
        known = name
        for ours, theirs in EXPERTS.items():
            known = known.replace(ours, theirs)
        names[name] = table.get_name(known, try_suffixes=(".weight", ".bias"))
        assert names[name], name
    return names


def as_converted(case, name, value, config):
    """What llama.cpp's converter does to a tensor's values."""
    if case.startswith("llama") and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        split = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(value.shape)
    return value + 1 if case.startswith("gemma") and "norm.weight" in name else value


def write(path, case, weights, kind="F32", *, skip=(), extra=None, **changes):
    """Write a case's weights as a converter would, with matrices in ``kind``; return what they then are."""
    _, config, metadata = CASES[case]
    config = COMMON | config | changes
    arch = case.split()[0]
    writer = gguf.GGUFWriter(path, arch)
    values = {METADATA[key]: value for key, value in config.items() if key in METADATA} | metadata
    for key, value in values.items():
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    for key in ("long_factor", "short_factor"):
        if key in config.get("rope_scaling", {}):
            factors = np.array(config["rope_scaling"][key], np.float32)
            writer.add_tensor(f"rope_factors_{key.split('_')[0]}.weight", factors)
    stored = {}
    for name, target in gguf_names(case, weights).items():
        number = gguf.GGMLQuantizationType[kind if weights[name].ndim > 1 else "F32"]
        stored[name] = gguf.dequantize(gguf.quantize(weights[name], number), number)
        data = gguf.quantize(as_converted(case, name, weights[name], config), number)
        if target not in skip:
            writer.add_tensor(target, data, raw_dtype=number)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def logits(model):
    return np.array(model(mx.array([[3, 1, 4, 1, 5, 92, 65, 35, 89, 7, 9, 3]])).astype(mx.float32))


def check(tmp_path, case, kind):
    expected, weights = reference(case)
    stored = write(tmp_path / "a.gguf", case, weights, kind)
    expected.load_weights([(name, mx.array(value)) for name, value in stored.items()])
    model, config = load_gguf(tmp_path, dtype=mx.float32)
    np.testing.assert_allclose(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
    return model, config


@pytest.mark.parametrize("case", CASES)
def test_architectures(tmp_path, case):
    _, config = check(tmp_path, case, "F32")
    theirs = AutoConfig.for_model(**config)
    assert theirs.hidden_size == HIDDEN
    assert theirs.rope_parameters.get("rope_theta", 20000.0) == 20000.0


@pytest.mark.parametrize("case", ["llama", "llama experts", "phi3"])
def test_architectures_quantized(tmp_path, case):
    check(tmp_path, case, "Q8_0")


@pytest.mark.parametrize(
    ("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q5_0", 5), ("Q5_1", 5), ("Q8_0", 8), ("F16", 0), ("BF16", 0)]
)
def test_types(tmp_path, kind, bits):
    model, config = check(tmp_path, "llama untied", kind)
    assert config.get("quantization", {}).get("bits", 0) == bits
    if bits:
        embedding = model.model.embed_tokens
        assert (embedding.bits, embedding.group_size, embedding.mode) == (bits, 32, "affine")
        assert model.model.layers[1].self_attn.q_proj.weight.dtype == mx.uint32


@pytest.mark.parametrize(
    ("case", "kind", "dtype"),
    [("llama", "Q4_0", mx.float16), ("llama", "BF16", mx.bfloat16), ("gemma", "Q8_0", mx.bfloat16)],
)
def test_default_dtype(tmp_path, case, kind, dtype):
    _, weights = reference(case)
    write(tmp_path / "a.gguf", case, weights, kind)
    model, config = load_gguf(tmp_path / "a.gguf")
    assert model.model.norm.weight.dtype == dtype
    assert config["torch_dtype"] == str(dtype).removeprefix("mlx.core.")


def test_other_types_are_expanded_with_one_warning(tmp_path, caplog):
    """A vocabulary in Q6_K: random blocks, as the gguf library cannot quantise to it."""
    _, weights = reference("llama")
    wide = {"hidden_size": 256, "intermediate_size": MLP}
    module = importlib.import_module("mlx_lm.models.llama")
    model = module.Model(module.ModelArgs.from_dict({"model_type": "llama", **COMMON, **wide, "head_dim": 64}))
    rng = np.random.default_rng(1)
    weights = {
        name: rng.normal(scale=0.1, size=value.shape).astype(np.float32)
        for name, value in tree_flatten(model.parameters())
    }
    blocks = rng.integers(0, 256, (VOCAB, 210), dtype=np.uint8)
    blocks[:, -2:] = np.full((VOCAB, 1), 1e-4, np.float16).view(np.uint8)
    path = tmp_path / "a.gguf"
    write(path, "llama", weights, skip=("token_embd.weight",), extra=None, **wide)
    _append_vocabulary(path, tmp_path / "b.gguf", blocks)
    with caplog.at_level(logging.WARNING):
        loaded, config = load_gguf(tmp_path / "b.gguf", dtype=mx.float32)
    wanted = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_allclose(np.array(loaded.model.embed_tokens.weight), wanted, rtol=1e-6)
    assert [record.getMessage() for record in caplog.records if "1 of Q6_K" in record.getMessage()]
    assert len(caplog.records) == 1
    assert "quantization" not in config


def _append_vocabulary(path, target, blocks):
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_missing_tensor_is_named(tmp_path):
    _, weights = reference("llama")
    write(tmp_path / "a.gguf", "llama", weights, skip=("blk.1.attn_v.weight",))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight"):
        load_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.9.attn_q.weight", "blk.0.attn_v.bias"])
def test_a_superfluous_tensor_is_named(tmp_path, name):
    _, weights = reference("llama")
    write(tmp_path / "a.gguf", "llama", weights, extra={name: np.zeros((32, 32), np.float32)})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_gguf(tmp_path / "a.gguf")


def test_a_misshapen_tensor_is_named(tmp_path):
    _, weights = reference("llama")
    write(tmp_path / "a.gguf", "llama", weights, intermediate_size=MLP + 32)
    with pytest.raises(CheckpointError, match=r"expected shape .* for 'blk\.0\.ffn_"):
        load_gguf(tmp_path / "a.gguf")


def test_a_truncated_file_is_refused(tmp_path):
    _, weights = reference("llama")
    write(tmp_path / "a.gguf", "llama", weights)
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_gguf(tmp_path / "a.gguf")
