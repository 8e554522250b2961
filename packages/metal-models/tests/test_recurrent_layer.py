"""Models whose layers carry a state generate what mlx-lm generates, however their requests are scheduled."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from metal_kv.spec import FullAttentionSpec, RecurrentStateSpec
from metal_models import PagedModel

NEW_TOKENS = 6

# One per kind of state and way of passing it; test_parity.py has them all.
FAMILIES = [
    "qwen3_next",
    "lfm2",
    "jamba",
    "mamba2",
    "granitemoehybrid",
    "recurrent_gemma",
    "kimi_linear",
    "baichuan_m1",
]


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


def preempt(server: Any, request: Any) -> None:
    """Take a request's blocks away: it is to be computed again from its first token."""
    for table in request.blocks:
        server.free.extend(table)
        table.clear()
    request.computed = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_and_chunked_prefill(family: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    check_family(lab, tiny(family))


@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_every_way_of_cutting_a_prompt(
    family: str, chunk: int, tiny: Callable[..., PagedModel], lab: SimpleNamespace
) -> None:
    check_family(lab, tiny(family), chunk)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_quantised_weights(family: str, bits: int, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    check_family(lab, tiny(family, bits=bits))


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "recurrent_gemma"])
def test_preempted_requests_start_again(family: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    model = tiny(family)
    texts = lab.prompts(model.vocab_size, (9, 14))
    server = lab.Server(model)
    requests = [server.request(text) for text in texts]
    first, second = requests
    server.step([(first, 9), (second, 6)])
    server.step([(first, 1), (second, 8)])
    preempt(server, second)
    server.step([(first, 1)])
    preempt(server, first)
    server.step([(second, 5)])
    server.step([(second, 10), (first, 11)])
    while len(first.logprobs) < NEW_TOKENS or len(second.logprobs) < NEW_TOKENS:
        server.step([(request, 1) for request in requests if len(request.logprobs) < NEW_TOKENS])
    check(lab, model, requests, texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_request_sees_nothing_of_the_one_whose_blocks_it_gets(
    family: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace
) -> None:
    model = tiny(family)
    texts = lab.prompts(model.vocab_size, (11, 3, 1))
    server = lab.Server(model)
    for text in texts:
        request = server.request(text)
        server.step([(request, len(text))])
        while len(request.logprobs) < NEW_TOKENS:
            server.step([(request, 1)])
        check(lab, model, [request], [text])
        for table in request.blocks:
            server.free.extend(reversed(table))


@pytest.mark.parametrize("steps", [(0, 3), (3,)], ids=["a step ends there", "a step runs past it"])
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "mamba2"])
def test_a_full_block_keeps_the_state_at_its_end(
    family: str, steps: Sequence[int], tiny: Callable[..., PagedModel], lab: SimpleNamespace
) -> None:
    model = tiny(family)
    server = lab.Server(model)
    shared = max(group.block_size for group in server.groups)
    first, other = lab.prompts(model.vocab_size, (shared + 7, 9))
    second = first[:shared] + other
    requests = [server.request(first)]
    for end in steps:
        server.step([(requests[0], shared + end - requests[0].computed)])
    requests.append(server.request(second, shares=requests[0], shared_tokens=shared))
    lab.serve_mixed(server, requests, NEW_TOKENS, chunk=64)
    check(lab, model, requests, [first, second])


def test_requests_in_any_order(tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    model = tiny("qwen3_next")
    texts = lab.prompts(model.vocab_size, (4, 7, 4, 4, 9))
    server = lab.Server(model)
    requests = [server.request(text) for text in texts]
    server.step([(request, count) for request, count in zip(requests, (2, 7, 1, 4, 8), strict=True)])
    server.step([(request, count) for request, count in zip(requests, (2, 1, 3, 1, 1), strict=True)])
    while any(len(request.logprobs) < NEW_TOKENS for request in requests):
        server.step([(request, 1) for request in requests if len(request.logprobs) < NEW_TOKENS])
    check(lab, model, requests, texts)


def test_specs(tiny: Callable[..., PagedModel]) -> None:
    state = RecurrentStateSpec(16, ((3, 128), (4, 16, 16)), (mx.float32, mx.float32))
    full = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=mx.float32)
    assert tiny("qwen3_next").kv_cache_specs(16) == {
        "layers.0.state": state,
        "layers.1.state": state,
        "layers.2.state": state,
        "layers.3.attn": full,
    }


def test_half_precision_keeps_what_the_model_keeps_in_full(
    tiny: Callable[..., PagedModel], lab: SimpleNamespace
) -> None:
    module = tiny("olmo_hybrid").module
    module.set_dtype(mx.bfloat16)
    specs = PagedModel(module, {"model_type": "olmo_hybrid"}).kv_cache_specs(16).values()
    (dtypes,) = {spec.dtypes for spec in specs if isinstance(spec, RecurrentStateSpec)}
    assert dtypes == (mx.bfloat16, mx.bfloat16, mx.bfloat16, mx.float32)


def test_half_precision_gives_the_same_rows(tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    module = tiny("mamba2").module
    module.set_dtype(mx.bfloat16)
    model = PagedModel(module, {"model_type": "mamba2"})
    caches = make_prompt_cache(module)
    module(mx.array([[5, 6]]), cache=caches)
    expected = module(mx.array([[7]]), cache=caches)[0]
    server = lab.Server(model)
    request = server.request([5, 6, 7])
    server.step([(request, 2)])
    hidden = server.step([(request, 1)])
    assert hidden.dtype == mx.bfloat16
    assert mx.array_equal(model.compute_logits(hidden), expected)


def test_a_model_still_runs_on_its_own_caches_after_it_was_paged(
    tiny: Callable[..., PagedModel], lab: SimpleNamespace
) -> None:
    model = tiny("lfm2")
    names = {name for name, _ in model.module.named_modules()}
    before = lab.mlx_lm_tokens(model, [1, 2, 3], NEW_TOKENS)[0]
    check_family(lab, model)
    assert lab.mlx_lm_tokens(model, [1, 2, 3], NEW_TOKENS)[0] == before
    assert {name for name, _ in model.module.named_modules()} == names
