"""Embeddings, scores and LoRA adapters through the real server and the real client."""

import json
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import openai
import pytest
from live_server import Server, serving
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3 import Model, ModelArgs

VOCAB = 160
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FLAGS = ("--served-model-name", "tiny", "--max-model-len", "128", "--kv-cache-memory-bytes", str(4 << 20))


def write_model(directory: Path) -> Model:
    """Write a tiny random Qwen3 and a tokenizer whose words are ``w3``, ``w4``, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = np.random.default_rng(1)
    model = Model(ModelArgs.from_dict(CONFIG))
    weights = {
        name: mx.array((0.25 * rng.standard_normal(array.shape)).astype(np.float32)) + (array.ndim == 1)
        for name, array in tree_flatten(model.parameters())
    }
    model.load_weights(list(weights.items()))
    directory.mkdir(parents=True)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def write_adapter(directory: Path, model: Model, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            output, inputs = module.weight.shape
            for letter, shape in (("A", (4, inputs)), ("B", (output, 4))):
                array = mx.array(rng.normal(0, 0.2, shape).astype(np.float32))
                tensors[f"base_model.model.{name}.lora_{letter}.weight"] = array
    directory.mkdir()
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), tensors)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def test_embeddings(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    texts = ["w5 w9 w17", "w40 " * 50, "w3"]
    with (
        serving(tmp_path / "model", tmp_path / "log", *FLAGS, "--runner", "pooling") as server,
        server.client() as client,
    ):
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
        encoded = client.embeddings.create(model="tiny", input=texts)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="tiny", prompt="w5")
        scored = post(server, "score", model="tiny", queries=texts[0], documents=texts[1:])
    rows = [np.array(model.model(mx.array([[int(word[1:]) for word in text.split()]]))[0, -1]) for text in texts]
    expected = [row / np.linalg.norm(row) for row in rows]
    assert scores_of(*scored) == pytest.approx([expected[0] @ row for row in expected[1:]], abs=2e-5)
    for row, item, other in zip(expected, answer.data, encoded.data, strict=True):
        np.testing.assert_allclose(item.embedding, row, atol=2e-5)
        np.testing.assert_allclose(other.embedding, item.embedding, atol=1e-6)
        assert math.isclose(np.linalg.norm(item.embedding), 1, abs_tol=1e-4)


XLM_ROBERTA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 130,
    "type_vocab_size": 1,
}


def write_encoder(directory: Path, name: str, **options: Any) -> Any:
    """Write a tiny random XLM-RoBERTa as transformers does, and a tokenizer whose words are ``w4``, ``w5``, …"""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.XLMRobertaConfig(**XLM_ROBERTA, **options)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    marks = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **marks)
    fast.save_pretrained(directory)
    return model


def encoded(model: Any, *texts: str) -> Any:
    """What transformers' model makes of one text, or of two between marks."""
    import torch

    ids = [0]
    for position, text in enumerate(texts):
        ids += [2] * bool(position) + [int(word[1:]) for word in text.split()] + [2]
    with torch.no_grad():
        return model(torch.tensor([ids]))


# The routes are those of the decoder above, the process that of the reranker below, the numbers those of the plugin's
# own tests.
@pytest.mark.slow
def test_embeddings_of_an_encoder(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "model", "XLMRobertaModel")
    texts = ["w5 w9 w17", "w40 " * 50, "w4"]
    flags = ("--served-model-name", "tiny")
    with serving(tmp_path / "model", tmp_path / "log", *flags) as server, server.client() as client:
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
        with pytest.raises(openai.BadRequestError, match="128"):
            client.embeddings.create(model="tiny", input="w5 " * 127)
        scored = post(server, "score", model="tiny", queries=texts[0], documents=texts[1:])
    expected = [encoded(model, text).last_hidden_state[0, 0].numpy() for text in texts]
    expected = [row / np.linalg.norm(row) for row in expected]
    for item, row in zip(answer.data, expected, strict=True):
        np.testing.assert_allclose(item.embedding, row, atol=2e-5)
    assert scores_of(*scored) == pytest.approx([expected[0] @ row for row in expected[1:]], abs=2e-5)


def test_reranking(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "model", "XLMRobertaForSequenceClassification", num_labels=1)
    query, documents = "w5 w9", ["w17 w20", "w40 w41 w42", "w9 " * 60]
    with serving(tmp_path / "model", tmp_path / "log", "--served-model-name", "tiny") as server:
        ranked = post(server, "rerank", model="tiny", query=query, documents=documents)
        scored = post(server, "score", model="tiny", queries=query, documents=documents)
        refused = post(server, "score", model="tiny", queries=query, documents="w5 " * 127)
    assert refused[0] == 400
    assert "128" in refused[1]
    expected = [float(encoded(model, query, document).logits.sigmoid()) for document in documents]
    assert ranked[0] == 200
    assert scores_of(*scored) == pytest.approx(expected, abs=2e-5)
    results = json.loads(ranked[1])["results"]
    assert [item["index"] for item in results] == list(np.argsort(expected)[::-1])
    for item in results:
        assert math.isclose(item["relevance_score"], expected[item["index"]], abs_tol=2e-5)


def post(server: Server, path: str, **body: Any) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{server.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scores_of(status: int, text: str) -> list[float]:
    assert status == 200, text
    return [item["score"] for item in json.loads(text)["data"]]


def test_adapters_at_start_and_at_run_time(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    first, second = (write_adapter(tmp_path / name, model, seed) for name, seed in (("first", 1), ("second", 2)))
    broken = write_adapter(tmp_path / "broken", model, 3)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    flags = ("--enable-lora", "--max-loras", "2", "--lora-modules", f"first={first}")
    with (
        serving(tmp_path / "model", tmp_path / "log", *FLAGS, *flags, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server,
        server.client() as client,
    ):

        def complete(name: str) -> str:
            answer = client.completions.create(model=name, prompt="w5 w9 w17", max_tokens=12, temperature=0)
            return str(answer.choices[0].text)

        texts = [complete("tiny"), complete("first")]
        status, text = post(server, "load_lora_adapter", lora_name="broken", lora_path=str(broken))
        assert status == 400
        assert "[lora] expected safetensors" in text
        assert post(server, "load_lora_adapter", lora_name="none", lora_path=str(tmp_path / "no"))[0] == 404
        assert post(server, "load_lora_adapter", lora_name="second", lora_path=str(second))[0] == 200
        texts.append(complete("second"))
        assert {card.id for card in client.models.list()} == {"tiny", "first", "second"}
        assert post(server, "unload_lora_adapter", lora_name="second")[0] == 200
        with pytest.raises(openai.NotFoundError):
            complete("second")
        assert [complete("tiny"), complete("first")] == texts[:2]
    assert len(set(texts)) == 3
