"""mlx-lm keeps working as before; paged views attend."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import base, llama
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from metal_models import MetalModelsError, interception
from metal_models.cache_view import CacheView, Step

ARGS = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}

PLAIN = """
import json, sys
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
mx.random.seed(0)
model = llama.Model(llama.ModelArgs.from_dict(json.loads(sys.argv[1])))
print([int(t) for t, _ in generate_step(mx.arange(9), model, max_tokens=6)])
assert "metal_models" not in sys.modules
"""


@pytest.fixture(autouse=True)
def _installed() -> None:
    interception.install()
    interception.install()


def qkv() -> list[mx.array]:
    key = mx.random.key(0)
    return [mx.random.normal((1, heads, 5, 64), key=key) for heads in (4, 2, 2)]


def test_model_files_call_the_replacement() -> None:
    assert base.scaled_dot_product_attention is interception.scaled_dot_product_attention
    assert llama.scaled_dot_product_attention is interception.scaled_dot_product_attention


@pytest.mark.parametrize("cache", [None, KVCache()])
def test_other_caches_attend_as_before(cache: KVCache | None) -> None:
    queries, keys, values = qkv()
    got = base.scaled_dot_product_attention(queries, keys, values, cache, scale=0.1, mask="causal")
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1, mask="causal")
    assert mx.array_equal(got, expected)


def test_quantised_caches_attend_as_before() -> None:
    queries, keys, values = qkv()
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1, mask="causal")
    cache = QuantizedKVCache()
    stored_keys, stored_values = cache.update_and_fetch(keys, values)
    got = base.scaled_dot_product_attention(queries, stored_keys, stored_values, cache, 0.1, "causal")
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=0.05)


@pytest.mark.slow
def test_generation_is_that_of_a_process_without_this_package() -> None:
    plain = subprocess.run([sys.executable, "-c", PLAIN, json.dumps(ARGS)], capture_output=True, text=True, check=True)
    mx.random.seed(0)
    model: nn.Module = llama.Model(llama.ModelArgs.from_dict(ARGS))
    tokens = [int(token) for token, _ in generate_step(mx.arange(9), model, max_tokens=6)]
    assert tokens == json.loads(plain.stdout)


def test_generation_over_plain_caches_is_that_of_whole_sequences() -> None:
    model: nn.Module = llama.Model(llama.ModelArgs.from_dict(ARGS))
    tokens = list(range(9))
    generated = [int(token) for token, _ in generate_step(mx.array(tokens), model, max_tokens=6)]
    for _ in range(6):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    assert generated == tokens[9:]


def test_a_mask_of_the_models_own_is_refused() -> None:
    view = CacheView(Step(), None)
    rows = mx.zeros((2, 1, 1, 8))
    view.update_and_fetch(rows, rows)
    with pytest.raises(MetalModelsError, match="its own attention mask"):
        base.scaled_dot_product_attention(rows, rows, rows, view, scale=1.0, mask=mx.ones((2, 2)))
