import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from metal_models import load
from vllm_metal_hub.cli import main
from vllm_metal_hub.errors import HubError
from vllm_metal_hub.held_weights import held_bytes

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_hidden_layers": 2,
    "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
    "vocab_size": 64, "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


def fp8(rows: int, columns: int) -> dict[str, mx.array]:
    return {
        "weight": mx.zeros((rows, columns), mx.uint8),
        "weight_scale_inv": mx.full((rows // 128, columns // 128), 3.0),
    }


def awq(rows: int, columns: int) -> dict[str, mx.array]:
    return {
        "qweight": mx.zeros((columns, rows // 8), mx.int32),
        "qzeros": mx.zeros((columns // 32, rows // 8), mx.int32),
        "scales": mx.ones((columns // 32, rows), mx.float16),
    }


def int8(rows: int, columns: int) -> dict[str, mx.array]:
    return {"weight": mx.zeros((rows, columns), mx.int8), "weight_scale": mx.ones((rows, 1))}


W8A8 = {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}
FORMATS: list[Any] = [
    (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    (awq, {"quant_method": "awq", "group_size": 32, "bits": 4}),
    (int8, {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": W8A8}),
]


def write(path: Path, store: Any, settings: dict[str, Any]) -> dict[str, Any]:
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = dict.fromkeys(("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"), (hidden, hidden))
    shapes |= {"mlp.gate": (inner, hidden), "mlp.up": (inner, hidden), "mlp.down": (hidden, inner)}
    tensors = {
        "model.embed_tokens.weight": mx.zeros((vocab, hidden), mx.bfloat16),
        "model.norm.weight": mx.ones((hidden,)),
    }
    for layer in ("model.layers.0", "model.layers.1"):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = mx.ones((hidden,), mx.bfloat16)
        for name, shape in shapes.items():
            tensors |= {f"{layer}.{name}_proj.{ending}": array for ending, array in store(*shape).items()}
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    config = CONFIG | {"quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(("store", "settings"), FORMATS, ids=["fp8", "awq", "int8"])
def test_what_is_planned_is_what_is_loaded(tmp_path: Path, store: Any, settings: dict[str, Any]) -> None:
    config = write(tmp_path, store, settings)
    held = load(tmp_path, dtype=mx.bfloat16).nbytes
    assert held_bytes(tmp_path, config, 0, dtype=mx.bfloat16) == held
    assert held_bytes(tmp_path / "not here", config, 0, dtype=mx.bfloat16) == pytest.approx(held, rel=0.02)
    expanded = load(tmp_path, dtype=mx.float32, expand_to_bytes=1 << 30).nbytes
    assert held_bytes(tmp_path, config, 0, dtype=mx.float32, expand_to_bytes=1 << 30) == expanded


def test_files_that_are_not_all_here(tmp_path: Path) -> None:
    config = write(tmp_path, *FORMATS[0])
    whole = held_bytes(tmp_path, config, 0, dtype=mx.bfloat16)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert held_bytes(tmp_path, config, 0, dtype=mx.bfloat16) == pytest.approx(whole, rel=0.02)
    assert held_bytes(tmp_path, CONFIG, 1000, dtype=mx.bfloat16) == 1000


def test_a_plan_for_a_mac(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, *FORMATS[0])
    assert main(["plan", str(tmp_path), "--memory", "16GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weight_bytes"] == load(tmp_path, dtype=mx.bfloat16).nbytes


def test_a_format_that_is_not_read(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(HubError, match="bitsandbytes"):
        held_bytes(tmp_path, config, 1000, dtype=mx.bfloat16)


def test_weights_that_are_loaded_as_they_are_stored(tmp_path: Path) -> None:
    assert held_bytes(tmp_path, CONFIG, 1000, dtype=mx.bfloat16) == 1000
