"""Decode steps of the fused program against the plain modules, through the kernels' twins."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.layout import CacheGroup, CacheLayout
from metal_kv.pool import KVCachePool
from metal_models.decode_program import decode_program
from metal_models.decode_step import DecodeStep

BLOCK_SIZE = 8


def pool_of(model):
    specs = model.kv_cache_specs(BLOCK_SIZE)
    by_window = {}
    for name, spec in specs.items():
        by_window.setdefault(spec.window, {})[name] = spec
    groups = [CacheGroup(tuple(layers), tuple(layers.values())) for layers in by_window.values()]
    return KVCachePool(CacheLayout.from_groups(groups, 64)), list(specs), len(groups)


def metadata_of(query_lens, seq_lens, groups):
    tables = [np.arange(1, 25, dtype=np.int32).reshape(3, 8) + 24 * group for group in range(groups)]
    starts = np.append(0, np.cumsum(query_lens)).astype(np.int32)
    return [AttentionMetadata.build(starts, np.array(seq_lens), table, BLOCK_SIZE) for table in tables]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("few_rows", [0, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_gives_the_tokens_of_the_plain_path(tiny, name, few_rows, bits):
    model = tiny(name, bits=bits)
    program = decode_program(model.module)
    (pool, names, groups), (plain_pool, _, _) = pool_of(model), pool_of(model)
    step = DecodeStep(program, [pool.layer(name) for name in names], compiled=False, few_rows=few_rows)
    prompts, seq_lens = [5, 1, 14], np.array([5, 1, 14])
    ids = mx.array(np.random.default_rng(0).integers(1, model.vocab_size, sum(prompts)), mx.int32)
    metadata = metadata_of(prompts, seq_lens, groups)
    assert not step.serves(metadata)
    last = mx.array(np.cumsum(prompts) - 1)
    tokens = []
    for cache in (plain_pool, pool):
        logits = model.compute_logits(model.forward(ids, metadata, cache)[last])
        mx.eval(logits, cache.arrays())
        tokens.append(mx.argmax(logits, axis=-1).astype(mx.int32))
    for _ in range(6):
        seq_lens += 1
        metadata = metadata_of([1, 1, 1], seq_lens, groups)
        assert step.serves(metadata)
        hidden = [model.forward(tokens[0], metadata, plain_pool), step(tokens[1], metadata)]
        mx.eval(hidden, plain_pool.arrays(), pool.arrays())
        np.testing.assert_allclose(*hidden, rtol=1e-3, atol=1e-3)
        tokens = [mx.argmax(model.compute_logits(rows), axis=-1).astype(mx.int32) for rows in hidden]
        assert tokens[0].tolist() == tokens[1].tolist()


def test_other_families_have_no_program(tiny):
    assert decode_program(tiny("gemma2").module) is None


def test_modules_that_are_not_linear_have_no_program(tiny):
    model = tiny("llama")
    model.module.model.layers[0].mlp.up_proj = nn.Sequential(model.module.model.layers[0].mlp.up_proj)
    assert decode_program(model.module) is None
