"""Encoders through vLLM's engine, in process: what transformers' models give for the same random weights."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from vllm import LLM, PoolingParams
from vllm.exceptions import VLLMClientError

TEXTS = ["w5 w9 w17", "w40 w41 " * 25, "w4", "w7 w8 w9 w10 w11"]
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 130,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
}
XLMR = {"type_vocab_size": 1}


def write_tokenizer(directory: Path) -> None:
    """Words ``w4``, ``w5``, …, between the marks that XLM-RoBERTa puts around one text or two; BERT's segments."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0 </s>:0", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(directory)


def saved(directory: Path, cls: str, config: Any) -> torch.nn.Module:
    """A random model whose norms, biases and heads matter, on disk."""
    torch.manual_seed(3)
    model = getattr(transformers, cls)(config).eval()
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
        parameter.data = scale * torch.randn_like(parameter) + (parameter.data if parameter.ndim == 1 else 0)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model


@pytest.fixture
def engine(make_engine: Callable[..., LLM], tmp_path: Path) -> Callable[..., LLM]:
    """Engines over what the test has saved."""
    return partial(make_engine, tmp_path, runner="pooling", max_num_seqs=8)


def ids_of(text: str) -> list[int]:
    return [0, *(int(word[1:]) for word in text.split()), 2]


def rows(model: Any, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).last_hidden_state[0].numpy()


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


EMBEDDERS = {
    "XLMRobertaModel": (transformers.XLMRobertaConfig(**SIZES | XLMR), "CLS", lambda rows: rows[0]),
    "BertModel": (transformers.BertConfig(**SIZES), "MEAN", lambda rows: rows.mean(0)),
    "ModernBertModel": (transformers.ModernBertConfig(**SIZES | {"local_attention": 16}), "CLS", lambda rows: rows[0]),
}


@pytest.mark.parametrize("architecture", EMBEDDERS)
def test_embeddings(engine: Callable[..., LLM], tmp_path: Path, architecture: str) -> None:
    """More prompts than run at a time, one of them as long as there are positions for."""
    config, pooling, pool = EMBEDDERS[architecture]
    model = saved(tmp_path, architecture, config)
    llm = engine(pooler_config={"seq_pooling_type": pooling}, max_num_batched_tokens=160)
    longest = 128 if architecture == "XLMRobertaModel" else 130
    assert llm.llm_engine.model_config.max_model_len == longest
    rng = np.random.default_rng(0)
    texts = [
        " ".join(f"w{i}" for i in rng.integers(4, 160, size)) for size in (*rng.integers(1, 100, 20), longest - 2)
    ]
    for output, text in zip(llm.embed(texts, use_tqdm=False), texts, strict=True):
        np.testing.assert_allclose(output.outputs.embedding, unit(pool(rows(model, ids_of(text)))), atol=2e-5)
    with pytest.raises(VLLMClientError, match=str(longest)):
        llm.embed([f"{texts[-1]} w9"], use_tqdm=False)


CLASSIFIERS = {
    "XLMRobertaForSequenceClassification": transformers.XLMRobertaConfig(**SIZES | XLMR, num_labels=3),
    "ModernBertForSequenceClassification": transformers.ModernBertConfig(**SIZES, num_labels=3),
}


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_classification(engine: Callable[..., LLM], tmp_path: Path, architecture: str) -> None:
    model = saved(tmp_path, architecture, CLASSIFIERS[architecture])
    for output, text in zip(engine().classify(TEXTS, use_tqdm=False), TEXTS, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids_of(text)])).logits[0].softmax(-1)
        np.testing.assert_allclose(output.outputs.probs, expected, atol=2e-5)


@pytest.mark.parametrize("family", ["XLMRoberta", "Bert"])
def test_reranking(engine: Callable[..., LLM], tmp_path: Path, family: str) -> None:
    """BERT tells the second text by its segment."""
    config = getattr(transformers, f"{family}Config")(**SIZES | (XLMR if family == "XLMRoberta" else {}), num_labels=1)
    model = saved(tmp_path, f"{family}ForSequenceClassification", config)
    query, documents = "w5 w9", ["w17 w20", "w40 w41 w42"]
    for output, document in zip(engine().score(query, documents, use_tqdm=False), documents, strict=True):
        first, second = ids_of(query), ids_of(document)[1:]
        types = (
            {} if family == "XLMRoberta" else {"token_type_ids": torch.tensor([[0] * len(first) + [1] * len(second)])}
        )
        with torch.no_grad():
            expected = model(torch.tensor([first + second]), **types).logits[0, 0].sigmoid()
        assert output.outputs.score == pytest.approx(float(expected), abs=2e-5)


@pytest.mark.parametrize("family", ["XLMRoberta", "ModernBert"])
def test_labels_of_tokens(engine: Callable[..., LLM], tmp_path: Path, family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES, num_labels=3)
    model = saved(tmp_path, f"{family}ForTokenClassification", config)
    llm = engine(pooler_config={"task": "token_classify"})
    for output, text in zip(llm.encode(TEXTS, pooling_task="token_classify", use_tqdm=False), TEXTS, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids_of(text)])).logits[0].softmax(-1)
        np.testing.assert_allclose(output.outputs.data, expected, atol=2e-5)


@pytest.mark.parametrize("task", ["embed&token_classify", "token_embed"])
def test_bge_m3_has_three_kinds_of_embeddings(engine: Callable[..., LLM], tmp_path: Path, task: str) -> None:
    model = saved(tmp_path, "XLMRobertaModel", transformers.XLMRobertaConfig(**SIZES | XLMR))
    sparse, vectors = torch.nn.Linear(64, 1), torch.nn.Linear(64, 64)
    torch.save(sparse.state_dict(), tmp_path / "sparse_linear.pt")
    torch.save(vectors.state_dict(), tmp_path / "colbert_linear.pt")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    llm = engine(hf_overrides={"architectures": ["BgeM3EmbeddingModel"]}, pooler_config={"task": task})
    outputs = llm.encode(TEXTS, PoolingParams(use_activation=True), pooling_task=task, use_tqdm=False)
    for output, text in zip(outputs, TEXTS, strict=True):
        hidden = torch.from_numpy(rows(model, ids_of(text)))
        with torch.no_grad():
            dense, weights = unit(hidden[0].numpy()), sparse(hidden).relu()[1:-1, 0].numpy()
            expected = unit(vectors(hidden)[1:].numpy()) if task == "token_embed" else np.concatenate([dense, weights])
        np.testing.assert_allclose(output.outputs.data, expected, atol=2e-5)


def test_checkpoint_without_the_head_is_refused(engine: Callable[..., LLM], tmp_path: Path) -> None:
    saved(tmp_path, "XLMRobertaModel", transformers.XLMRobertaConfig(**SIZES | XLMR))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["XLMRobertaForSequenceClassification"]})
    )
    with pytest.raises(Exception, match=r"classifier\.dense\.weight"):
        engine()


@pytest.mark.parametrize(
    ("options", "text"),
    [({"enable_chunked_prefill": True}, "--enable-chunked-prefill"), ({"convert": "classify"}, "--convert")],
)
def test_options_that_do_not_go_with_an_encoder(
    engine: Callable[..., LLM], tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    saved(tmp_path, "XLMRobertaModel", transformers.XLMRobertaConfig(**SIZES | XLMR))
    with pytest.raises(Exception, match=text):
        engine(**options)
