"""vLLM's pooling runner, in process, over a tiny model: rows must be those of mlx-lm's own forward pass."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3 import Model, ModelArgs
from vllm import LLM, PoolingParams

PROMPTS = [[1, 5, 9, 17], [1, *range(10, 80)], [1, 33, 44], [1, *[7, 8, 9] * 9], [1]]
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Saved:
    """A tiny random Qwen3 on disk, and what mlx-lm makes of it."""

    def __init__(self, directory: Path, model_dir: Path) -> None:
        self.directory = directory
        rng = np.random.default_rng(1)
        self.module = Model(ModelArgs.from_dict(CONFIG))
        self.weights = {
            name: mx.array((0.25 * rng.standard_normal(array.shape)).astype(np.float32)) + (array.ndim == 1)
            for name, array in tree_flatten(self.module.parameters())
        }
        self.module.load_weights(list(self.weights.items()))
        self.save({}, self.weights)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_bytes((model_dir / name).read_bytes())

    def save(self, changes: dict[str, Any], weights: dict[str, mx.array]) -> None:
        mx.save_safetensors(str(self.directory / "model.safetensors"), weights, metadata={"format": "mlx"})
        (self.directory / "config.json").write_text(json.dumps(CONFIG | changes))

    def rows(self, prompt: Sequence[int]) -> np.ndarray:
        return np.array(self.module.model(mx.array([list(prompt)]))[0])


@pytest.fixture
def saved(tmp_path: Path, model_dir: Path) -> Saved:
    return Saved(tmp_path, model_dir)


@pytest.fixture
def engine(make_engine: Callable[..., LLM], saved: Saved) -> Callable[..., LLM]:
    """Engines that pool."""
    return partial(
        make_engine,
        saved.directory,
        runner="pooling",
        max_model_len=128,
        max_num_seqs=8,
        kv_cache_memory_bytes=4 << 20,
    )


def inputs(prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]


def normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def embed(llm: LLM, prompts: Sequence[Sequence[int]], **params: Any) -> list[np.ndarray]:
    outputs = llm.embed(inputs(prompts), pooling_params=PoolingParams(**params), use_tqdm=False)
    return [np.array(output.outputs.embedding) for output in outputs]


@pytest.mark.parametrize("max_num_batched_tokens", [256, 16])
def test_last_rows_also_of_chunked_prompts(
    engine: Callable[..., LLM], saved: Saved, max_num_batched_tokens: int
) -> None:
    llm = engine(max_num_batched_tokens=max_num_batched_tokens, block_size=8)
    expected = [normalised(saved.rows(prompt)[-1]) for prompt in PROMPTS]
    for _ in range(2):  # the second time from cached prefixes
        for got, want in zip(embed(llm, PROMPTS), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(("pooling", "pool"), [("MEAN", lambda rows: rows.mean(0)), ("CLS", lambda rows: rows[0])])
def test_other_sequence_pooling(engine: Callable[..., LLM], saved: Saved, pooling: str, pool: Any) -> None:
    llm = engine(pooler_config={"seq_pooling_type": pooling})
    for got, prompt in zip(embed(llm, PROMPTS), PROMPTS, strict=True):
        np.testing.assert_allclose(got, normalised(pool(saved.rows(prompt))), atol=2e-5)


def test_over_contiguous_caches(engine: Callable[..., LLM], saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    llm = engine(max_num_batched_tokens=16)
    expected = [normalised(saved.rows(prompt)[-1]) for prompt in PROMPTS]
    for _ in range(2):
        for got, want in zip(embed(llm, PROMPTS), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)


def test_dimensions_and_activation(engine: Callable[..., LLM], saved: Saved) -> None:
    llm = engine(hf_overrides={"is_matryoshka": True})
    [plain] = embed(llm, PROMPTS[:1], use_activation=False)
    np.testing.assert_allclose(plain, saved.rows(PROMPTS[0])[-1], atol=2e-4)
    [short] = embed(llm, PROMPTS[:1], dimensions=24)
    np.testing.assert_allclose(short, normalised(saved.rows(PROMPTS[0])[-1][:24]), atol=2e-5)


def test_rows_of_every_token(engine: Callable[..., LLM], saved: Saved) -> None:
    llm = engine(pooler_config={"task": "token_embed"}, max_num_batched_tokens=16)
    outputs = llm.encode(inputs(PROMPTS), pooling_task="token_embed", use_tqdm=False)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        np.testing.assert_allclose(output.outputs.data.numpy(), normalised(saved.rows(prompt)), atol=2e-5)


def test_backbone_checkpoint(engine: Callable[..., LLM], saved: Saved) -> None:
    backbone = {name.removeprefix("model."): a for name, a in saved.weights.items() if name.startswith("model.")}
    saved.save({}, backbone)
    for got, prompt in zip(embed(engine(), PROMPTS), PROMPTS, strict=True):
        np.testing.assert_allclose(got, normalised(saved.rows(prompt)[-1]), atol=2e-5)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def test_classification_with_a_score_head(engine: Callable[..., LLM], saved: Saved) -> None:
    score = mx.random.normal((3, 64), key=mx.random.key(4))
    labels = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    weights = {name: array for name, array in saved.weights.items() if name.startswith("model.")}
    saved.save(labels, weights | {"score.weight": score})
    outputs = engine().classify(inputs(PROMPTS), use_tqdm=False)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        expected = softmax(np.array(score) @ saved.rows(prompt)[-1])
        np.testing.assert_allclose(output.outputs.probs, expected, atol=2e-5)


def test_reranking_by_the_logits_of_two_tokens(engine: Callable[..., LLM], saved: Saved) -> None:
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["w11", "w12"],
        "is_original_qwen3_reranker": True,
    }
    llm = engine(hf_overrides=overrides)
    head = np.array(saved.weights["lm_head.weight"])
    for output in llm.score("w5 w9", [" w17 w20", " w40 w41 w42"], use_tqdm=False):
        assert output.prompt_token_ids[-1] in (20, 42)
        no, yes = head[[11, 12]] @ saved.rows(output.prompt_token_ids)[-1]
        assert output.outputs.score == pytest.approx(1 / (1 + np.exp(no - yes)), abs=2e-5)


def test_model_without_a_score_head_is_refused(engine: Callable[..., LLM], saved: Saved) -> None:
    saved.save({"architectures": ["Qwen3ForSequenceClassification"]}, saved.weights)
    with pytest.raises(Exception, match=r"score\.weight"):
        engine()


def test_failing_step_ends_its_requests_and_not_the_engine(engine: Callable[..., LLM], saved: Saved) -> None:
    llm = engine()
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    forward = worker.model.forward

    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        worker.model.forward = forward
        raise RuntimeError("[metal::malloc] Attempting to allocate too much")

    worker.model.forward = out_of_memory
    [failed] = llm.encode(inputs(PROMPTS[:1]), pooling_task="embed", use_tqdm=False)
    assert failed.error.code == "step_failed"
    assert not failed.error.retryable
    [got] = embed(llm, PROMPTS[:1])
    np.testing.assert_allclose(got, normalised(saved.rows(PROMPTS[0])[-1]), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pooler_config": {"seq_pooling_type": "MEAN"}, "enable_chunked_prefill": True}, "--enable-chunked-prefill"),
        ({"pooler_config": {"seq_pooling_type": "CLS"}, "enable_prefix_caching": True}, "--enable-prefix-caching"),
        ({"hf_overrides": {"is_causal": False}}, "Bidirectional"),
    ],
)
def test_what_cannot_be_pooled_is_refused(engine: Callable[..., LLM], options: dict[str, Any], text: str) -> None:
    with pytest.raises(Exception, match=text):
        engine(**options)
