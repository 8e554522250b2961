"""Every architecture of mlx-lm: served among others, in pieces, evicted and from shared blocks, it generates the same.

A tiny config for each is in ``configs``; ``config_variants`` changes these to what is special in popular checkpoints.
What is refused is skipped with its reason.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_models import PagedModel, UnsupportedModelError, supported

NEW_TOKENS = 4
# mlx-lm's own cache is one token shorter than the window its masks ask for, so its whole forward pass is compared.
WITHOUT_CACHE = {"plamo3"}
# mlx-lm itself cannot quantise these: their projections do not take the arguments that nn.quantize passes.
UNQUANTISED = {"afm7"}
ARCHITECTURES = sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.json"))
VARIANTS = {
    f"{path.stem}: {name}": (path.stem, changes)
    for path in sorted((Path(__file__).parent / "config_variants").glob("*.json"))
    for name, changes in json.loads(path.read_text()).items()
}
QUICK = (
    "deepseek_v3: deepseek-v3",
    "gemma4: gemma4-e2b",
    "internlm3: internlm3",
    "llama4: llama4-scout",
    "nemotron_h: nemotron-3-nano",
    "nemotron-nas: nemotron-nas 49b",
)
ABSENT = "absent"


def check(lab: SimpleNamespace, model: PagedModel, request: Any, prompt: list[int]) -> None:
    """Compare tokens and log-probabilities with mlx-lm's own generation."""
    generate = whole_passes if model.config["model_type"] in WITHOUT_CACHE else lab.mlx_lm_tokens
    tokens, logprobs = generate(model, prompt, NEW_TOKENS)
    assert request.tokens[len(prompt) :] == tokens
    np.testing.assert_allclose(np.stack(request.logprobs), logprobs, rtol=1e-4, atol=2e-4)


def whole_passes(model: PagedModel, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Generate greedily with a forward pass over everything for each token."""
    text, rows = list(prompt), []
    for _ in range(count):
        logits = model.module(mx.array([text]))[0, -1]
        rows.append(np.array(logits - mx.logsumexp(logits)))
        text.append(int(rows[-1].argmax()))
    return text[len(prompt) :], np.stack(rows)


def serve(lab: SimpleNamespace, model: PagedModel) -> None:
    """Serve requests that meet everything a scheduler does to them."""
    server = lab.Server(model)
    shared = max(group.block_size for group in server.groups)
    first, second, third, fourth = lab.prompts(model.vocab_size, (shared + 9, 13, 3, 6))
    follower = first[:shared] + fourth
    requests = {"first": server.request(first), "second": server.request(second), "third": server.request(third)}
    server.step([(requests["first"], shared)])
    server.step([(requests["first"], 5), (requests["second"], 7)])
    server.step([(requests["third"], 3), (requests["first"], 4), (requests["second"], 2)])
    # The second loses its blocks and starts again; another joins with blocks that the first has filled.
    for table in requests["second"].blocks:
        server.free.extend(table)
        table.clear()
    requests["second"].computed = 0
    requests["follower"] = server.request(follower, shares=requests["first"], shared_tokens=shared)
    lab.serve_mixed(server, list(requests.values()), NEW_TOKENS, chunk=5)
    texts = {"first": first, "second": second, "third": third, "follower": follower}
    for name, prompt in texts.items():
        check(lab, model, requests[name], prompt)


def model_or_skip(tiny: Callable[..., PagedModel], architecture: str, **options: Any) -> PagedModel:
    try:
        return tiny(architecture, **options)
    except UnsupportedModelError as error:
        pytest.skip(error.reason)


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a config with changes, those of ``text_config`` within it; ``"absent"`` takes a name out."""
    new = dict(config)
    for name, value in changes.items():
        inner = name == "text_config" and name in config
        new[name] = changed(config[name], value) if inner else value
    return {name: value for name, value in new.items() if value != ABSENT}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_popular_checkpoints(variant: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    architecture, changes = VARIANTS[variant]
    serve(lab, tiny(changed(lab.read_config(architecture), changes)))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_precision(architecture: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    serve(lab, model_or_skip(tiny, architecture))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_bits(architecture: str, tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    if architecture in UNQUANTISED:
        pytest.skip("mlx-lm cannot quantise it")
    serve(lab, model_or_skip(tiny, architecture, bits=4))


@pytest.mark.slow
def test_nine_of_ten_architectures_run(lab: SimpleNamespace) -> None:
    refused = {}
    for architecture in ARCHITECTURES:
        try:
            supported(lab.read_config(architecture))
        except UnsupportedModelError as error:
            refused[architecture] = error.reason
    assert len(refused) <= len(ARCHITECTURES) // 10, refused
