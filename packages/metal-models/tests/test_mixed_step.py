"""Decode steps of mixed layers against the plain modules, through the kernels' twins."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from metal_kv import unify_page_sizes
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.layout import CacheGroup, CacheLayout
from metal_kv.pool import KVCachePool
from metal_models.decode_families import mixed_program
from metal_models.mixed_step import MixedStep

BLOCK_SIZE = 4
FAMILIES = [
    "qwen3_next", "qwen3_5", "qwen3_5_moe", "lfm2", "lfm2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite",
    "mamba2", "granitemoehybrid", "nemotron_h", "falcon_h1",
]  # fmt: skip


def pool_of(model):
    specs = unify_page_sizes(model.kv_cache_specs(BLOCK_SIZE), state_block_size=BLOCK_SIZE)
    by_kind = {}
    for name, spec in specs.items():
        by_kind.setdefault((type(spec), spec.block_size), {})[name] = spec
    groups = [CacheGroup(tuple(layers), tuple(layers.values())) for layers in by_kind.values()]
    return KVCachePool(CacheLayout.from_groups(groups, 80)), groups


def metadata_of(query_lens, seq_lens, groups):
    """Give each request blocks of its own in every group, in an order of no meaning."""
    starts = np.array([0, *itertools.accumulate(query_lens)], np.int32)
    blocks = np.random.default_rng(1).permutation(79).astype(np.int32) + 1
    tables = [blocks[:36].reshape(3, 12), blocks[36:72].reshape(3, 12)]
    return [
        AttentionMetadata.build(starts, np.array(seq_lens), table, group.block_size, keeps_rows=group.keeps_rows)
        for table, group in zip(tables, groups, strict=False)
    ]


def step_of(model, pool):
    program = mixed_program(model.module)
    wanted = program.caches([f"layers.{index}" for index in range(program.num_caches)])
    assert set(wanted) <= set(pool.layer_names)
    return MixedStep(program, [pool.layer(name) for name in wanted], compiled=False)


@pytest.mark.parametrize(
    ("name", "bits"),
    [*((name, None) for name in FAMILIES), ("qwen3_next", 4), ("lfm2", 4), ("deepseek_v2", 4), ("deepseek_v3", 4)],
    ids=str,
)
def test_gives_the_tokens_of_the_plain_path(tiny, name, bits):
    model = tiny(name, bits=bits)
    (pool, groups), (plain_pool, _) = pool_of(model), pool_of(model)
    step = step_of(model, pool)
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
    for _ in range(9):
        seq_lens += 1
        metadata = metadata_of([1, 1, 1], seq_lens, groups)
        assert step.serves(metadata)
        hidden = [model.forward(tokens[0], metadata, plain_pool), step(tokens[1], metadata)]
        mx.eval(hidden, plain_pool.arrays(), pool.arrays())
        np.testing.assert_allclose(*hidden, rtol=2e-3, atol=2e-3)
        tokens = [mx.argmax(model.compute_logits(rows), axis=-1).astype(mx.int32) for rows in hidden]
        assert tokens[0].tolist() == tokens[1].tolist()


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "mamba2"])
def test_requests_that_start_with_one_token(tiny, name):
    model = tiny(name)
    (pool, groups), (plain_pool, _) = pool_of(model), pool_of(model)
    step = step_of(model, pool)
    for cache in (pool, plain_pool):  # what other requests left behind
        model.forward(mx.arange(1, 13, dtype=mx.int32), metadata_of([4, 4, 4], [4, 4, 4], groups), cache)
        mx.eval(cache.arrays())
    metadata = metadata_of([1, 1, 1], [1, 1, 1], groups)
    ids = mx.array([3, 5, 7], mx.int32)
    np.testing.assert_allclose(step(ids, metadata), model.forward(ids, metadata, plain_pool), rtol=2e-3, atol=2e-3)


def test_other_families_have_no_program(tiny):
    assert mixed_program(tiny("jamba").module) is None


def test_kernels_that_are_switched_off_leave_no_program(tiny):
    assert mixed_program(tiny("qwen3_next").module, gdn_kernel=False) is None
    assert mixed_program(tiny("deepseek_v3").module, mla_kernel=False) is None
