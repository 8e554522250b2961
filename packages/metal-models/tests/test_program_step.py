"""Decode steps of programs against the plain modules, through the kernels' twins."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metal_models.decode_families import decode_program
from metal_models.program_step import bound_step

FAMILIES = [
    "llama", "qwen2", "qwen3", "qwen3_next", "qwen3_5", "qwen3_5_moe", "lfm2", "lfm2_moe", "deepseek_v2",
    "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu_llm", "mamba2", "granitemoehybrid", "nemotron_h", "falcon_h1",
]  # fmt: skip
QUANTISED = ["llama", "qwen2", "qwen3", "qwen3_next", "lfm2", "deepseek_v2", "deepseek_v3", "minicpm3"]


def step_of(model, pool):
    program = decode_program(model.module)
    wanted = program.caches([f"layers.{index}" for index in range(program.num_caches)])
    assert set(wanted) <= set(pool.layer_names)
    return bound_step(program, [pool.layer(name) for name in wanted], compiled=False)


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, None) for name in FAMILIES), *((name, 4) for name in QUANTISED)], ids=str
)
def test_gives_the_tokens_of_the_plain_path(tiny, lab, name, bits):
    model = tiny(name, bits=bits)
    pool, _ = lab.decode_pool(model)
    lab.check_decode(model, pool, step_of(model, pool))


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "mamba2"])
def test_requests_that_start_with_one_token(tiny, lab, name):
    model = tiny(name)
    (pool, groups), (plain_pool, _) = lab.decode_pool(model), lab.decode_pool(model)
    step = step_of(model, pool)
    for cache in (pool, plain_pool):  # what other requests left behind
        model.forward(mx.arange(1, 13, dtype=mx.int32), lab.decode_metadata([4, 4, 4], [4, 4, 4], groups), cache)
        mx.eval(cache.arrays())
    metadata = lab.decode_metadata([1, 1, 1], [1, 1, 1], groups)
    ids = mx.array([3, 5, 7], mx.int32)
    np.testing.assert_allclose(step(ids, metadata), model.forward(ids, metadata, plain_pool), rtol=2e-3, atol=2e-3)


def test_other_families_have_no_program(tiny):
    assert decode_program(tiny("jamba").module) is None
    assert decode_program(tiny("gemma2").module) is None


def test_modules_that_are_not_linear_have_no_program(tiny):
    model = tiny("llama")
    model.module.model.layers[0].mlp.up_proj = nn.Sequential(model.module.model.layers[0].mlp.up_proj)
    assert decode_program(model.module) is None


def test_kernels_that_are_switched_off_leave_no_program(tiny):
    assert decode_program(tiny("qwen3_next").module, gdn_kernel=False) is None
    assert decode_program(tiny("deepseek_v3").module, mla_kernel=False) is None
