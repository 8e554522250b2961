"""Compiled decode steps of models' own modules against the plain path, through the kernels' twins."""

import logging

import mlx.core as mx
import numpy as np
import pytest

from metal_models.head_split import HeadSplit
from metal_models.module_step import ModuleStep
from metal_models.tracing import trace

# Full attention, windows, a soft cap, sinks, chunks, shared layers, latents, states of several kinds, and mixtures.
FAMILIES = [
    "gemma2", "gemma3n", "gpt_oss", "llama4", "longcat_flash_ngram", "jamba", "mamba", "kimi_linear",
    "recurrent_gemma", "rwkv7", "plamo2", "bailing_moe_linear", "olmo_hybrid", "baichuan_m1",
]  # fmt: skip


def step_of(model, pool):
    split = HeadSplit(model.module)
    layers = trace(model.module, split, model.config["model_type"]).layers
    return ModuleStep(model.module, split, layers, pool, compiled=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_gives_the_tokens_of_the_plain_path(tiny, lab, name):
    model = tiny(name)
    pool, _ = lab.decode_pool(model)
    lab.check_decode(model, pool, step_of(model, pool), steps=6)


@pytest.mark.parametrize("name", ["deepseek_v32", "minimax_m3_vl"])  # which pick eight keys
def test_steps_that_look_at_lengths_are_left_to_the_plain_path(tiny, lab, caplog, name):
    model = tiny(name)
    (pool, groups), (plain_pool, _) = lab.decode_pool(model), lab.decode_pool(model)
    step = step_of(model, pool)
    ids = mx.array([3, 5, 7], mx.int32)
    with caplog.at_level(logging.INFO):
        for seq_lens in ([9, 12, 10], [10, 13, 11]):
            assert step(ids, lab.decode_metadata([1, 1, 1], seq_lens, groups)) is None
    assert caplog.text.count("reads lengths on the host") == 1
    metadata = lab.decode_metadata([1, 1, 1], [9, 12, 10], groups)
    np.testing.assert_array_equal(model.forward(ids, metadata, pool), model.forward(ids, metadata, plain_pool))


def test_requests_that_start_are_left_to_the_plain_path(tiny, lab):
    model = tiny("jamba")
    pool, groups = lab.decode_pool(model)
    step = step_of(model, pool)
    assert step.serves(lab.decode_metadata([1, 1, 1], [2, 9, 4], groups))
    assert not step.serves(lab.decode_metadata([1, 1, 1], [2, 1, 4], groups))
