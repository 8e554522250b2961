import math
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metal_kv import (
    CacheGroup,
    FullAttentionSpec,
    MemoryBudget,
    MetalKVError,
    NotEnoughMemoryError,
    SlidingWindowSpec,
    bytes_per_block,
)

MAC_64GB = 48 << 30
GB = 10**9


def test_the_line_of_a_real_server():
    sliding = SlidingWindowSpec(16, 8, 256, dtype=mx.bfloat16, sliding_window=1024)
    full = FullAttentionSpec(16, 2, 512, dtype=mx.bfloat16)
    layers = tuple(full if i % 6 == 5 else sliding for i in range(30))
    budget = MemoryBudget.plan(
        MAC_64GB,
        0.9,
        model_memory=14_958 * 10**6,
        overhead=1_130 * 10**6,
        per_block_bytes=bytes_per_block([CacheGroup(tuple(map(str, range(30))), layers)]),
        block_size=16,
    )
    assert str(budget) == (
        "Paged attention memory breakdown: metal_limit=51.54GB, fraction=0.90, usable_metal=46.39GB, "
        "model_memory=14.96GB, overhead=1.13GB, kv_budget=30.30GB, per_block_bytes=3604480, num_blocks=8405, "
        "max_tokens_cached=134480"
    )
    budget.require(130_000)


def state_bytes(layers, value_heads, conv_channels):
    """Gated delta net: a 128 x 128 float32 state per value head, and 3 bfloat16 columns per channel."""
    return layers * (value_heads * 128 * 128 * 4 + conv_channels * 3 * 2)


QWEN_35B = 256 * state_bytes(30, 32, 8192)
QWEN_27B = 256 * state_bytes(48, 48, 10240)


@pytest.mark.parametrize(
    ("model_memory", "overhead", "states", "figures"),
    [
        (21_636, 1_076, QWEN_35B, "21.64GB, overhead=1.08GB, recurrent_state=16.48GB, kv_budget=-0.54GB"),
        (22_745, 996, QWEN_35B, "22.75GB, overhead=1.00GB, recurrent_state=16.48GB, kv_budget=-1.57GB"),
        (26_190, 1_161, QWEN_27B, "26.19GB, overhead=1.16GB, recurrent_state=39.41GB, kv_budget=-28.11GB"),
    ],
)
def test_the_refusals_of_real_servers_add_up(model_memory, overhead, states, figures):
    budget = MemoryBudget.plan(
        MAC_64GB,
        0.75,
        model_memory=model_memory * 10**6,
        overhead=overhead * 10**6,
        per_block_bytes=327_680,
        block_size=16,
        recurrent_state=states,
    )
    with pytest.raises(NotEnoughMemoryError) as refusal:
        budget.require(32_768, max_num_seqs=256)
    assert str(refusal.value).startswith(
        "Paged attention: not enough Metal memory for KV cache. metal_limit=51.54GB, fraction=0.75, "
        f"usable_metal=38.65GB, model_memory={figures}. "
    )
    assert "reduce --max-num-seqs to" in str(refusal.value)
    assert ("VLLM_METAL_MEMORY_FRACTION" in str(refusal.value)) == (states == QWEN_35B)


def test_an_empty_budget_has_no_blocks():
    budget = MemoryBudget.plan(GB, 0.5, model_memory=GB, overhead=0, per_block_bytes=100, block_size=16)
    assert (budget.num_blocks, budget.max_tokens_cached, budget.max_model_len(1000)) == (0, 0, 0)


def window_blocks(num_tokens):
    return math.ceil(num_tokens / 16) + math.ceil(min(num_tokens, 100) / 16) + 1


@st.composite
def shortages(draw):
    """A plan, and a request that it cannot hold."""
    limit = draw(st.integers(10**6, 10**8))
    states, max_num_seqs = draw(st.sampled_from([(0, None), (limit // 5, 7)]))
    budget = MemoryBudget.plan(
        limit,
        draw(st.sampled_from([0.25, 0.5, 0.75, 0.9, 1.0])),
        model_memory=draw(st.integers(0, limit // 2)),
        overhead=draw(st.integers(0, limit // 10)),
        per_block_bytes=4 * draw(st.integers(1, 5000)),
        block_size=16,
        recurrent_state=states,
        kv_budget_limit=draw(st.sampled_from([None, limit // 50])),
    )
    blocks_for = draw(st.sampled_from([None, window_blocks]))
    max_model_len = draw(st.integers(1, 200_000))
    per_block = budget.per_block_bytes
    options = {"other_formats": {"--eight": per_block // 4, "--sixteen": per_block // 2}, "max_num_seqs": max_num_seqs}
    assume(
        (budget.kv_budget // budget.per_block_bytes) <= (blocks_for or (lambda n: math.ceil(n / 16)))(max_model_len)
    )
    return budget, max_model_len, blocks_for, options


def holds(budget, max_model_len, blocks_for):
    try:
        budget.require(max_model_len, blocks_for)
    except NotEnoughMemoryError:
        return False
    return True


def replan(budget, **changes):
    given = {
        name: getattr(budget, name)
        for name in ("metal_limit", "fraction", "model_memory", "overhead", "per_block_bytes", "block_size")
    }
    return MemoryBudget.plan(**{**given, "recurrent_state": budget.recurrent_state, **changes})


@given(shortages())
def test_every_remedy_works_and_no_smaller_change_would(shortage):
    budget, length, blocks_for, options = shortage
    with pytest.raises(MetalKVError) as refusal:
        budget.require(length, blocks_for, **options)
    text = str(refusal.value)
    bounded = budget.kv_budget < replan(budget).kv_budget

    if found := re.search(r"to at least ([0-9.]+)(;|\.$)", text):
        fraction = float(found[1])
        assert fraction <= 1.0
        assert holds(replan(budget, fraction=fraction), length, blocks_for)
        assert not holds(replan(budget, fraction=fraction - 0.01), length, blocks_for)
    elif not bounded:
        assert not holds(replan(budget, fraction=1.0), length, blocks_for)
    if found := re.search(r"at least (\d+) bytes", text):
        assert holds(replan(budget, kv_budget_limit=int(found[1])), length, blocks_for)
        assert not holds(replan(budget, kv_budget_limit=int(found[1]) - 1), length, blocks_for)
    if found := re.search(r"max-model-len to (\d+)", text):
        assert holds(budget, int(found[1]), blocks_for)
        assert not holds(budget, int(found[1]) + 1, blocks_for)
    else:
        assert not holds(budget, 1, blocks_for)
    fits_in = {
        setting: holds(replace(budget, per_block_bytes=size), length, blocks_for)
        for setting, size in options["other_formats"].items()
    }
    assert ("--sixteen" in text) == fits_in["--sixteen"]
    assert ("--eight" in text) == (fits_in["--eight"] and not fits_in["--sixteen"])
    if found := re.search(r"max-num-seqs to (\d+)", text):
        fewer = int(found[1]) * budget.recurrent_state // options["max_num_seqs"]
        assert holds(replan(budget, recurrent_state=fewer), length, blocks_for)


def test_a_smaller_model_is_always_worth_saying_when_it_helps():
    budget = MemoryBudget.plan(
        10 * GB, 1.0, model_memory=9 * GB, overhead=2 * GB, per_block_bytes=10**8, block_size=16
    )
    with pytest.raises(NotEnoughMemoryError, match=r"one block of tokens: 0\.20GB.*at least 1\.20GB smaller"):
        budget.require()


def test_two_million_tokens_of_a_small_model_on_a_36_gb_mac():
    """Qwen2.5-0.5B-4bit: 24 layers, 2 key heads of 64; Metal recommends three quarters of such a Mac's memory."""
    spec = FullAttentionSpec(16, 2, 64, dtype=mx.bfloat16)
    groups = [CacheGroup(tuple(map(str, range(24))), spec)]
    budget = MemoryBudget.plan(
        36 * (1 << 30) * 3 // 4,
        0.9,
        model_memory=278 * 10**6,
        overhead=400 * 10**6,
        per_block_bytes=bytes_per_block(groups),
        block_size=16,
    )
    assert budget.per_block_bytes == 16 * 24 * 2 * 2 * 64 * 2
    assert budget.max_tokens_cached == pytest.approx(2.0e6, rel=0.05)
    assert budget.max_tokens_cached * 12_288 == pytest.approx(budget.kv_budget, rel=1e-3)
    # All of Metal's share for the cache: 27 GB.
    whole = MemoryBudget.plan(
        27 * GB, 1.0, model_memory=0, overhead=0, per_block_bytes=bytes_per_block(groups), block_size=16
    )
    assert whole.max_tokens_cached == pytest.approx(2.2e6, rel=0.01)


def test_the_length_that_a_real_server_estimates():
    """131,072 tokens need 27.5 GiB where 21.01 GiB are there: 100,160 tokens fit, as vLLM says."""
    per_block = 3_604_480
    budget = MemoryBudget.plan(
        int(21.01 * (1 << 30)), 1.0, model_memory=0, overhead=0, per_block_bytes=per_block, block_size=16
    )
    assert 131_072 // 16 * per_block / (1 << 30) == pytest.approx(27.5, abs=0.05)
    assert budget.max_model_len(131_072) == pytest.approx(100_160, rel=1e-3)
    with pytest.raises(NotEnoughMemoryError, match="reduce --max-model-len to 100"):
        budget.require(131_072)


def test_a_server_that_is_one_block_short():
    """A hybrid of 10 attention layers, 2 key heads of 256: 0.7 GiB needed and 0.7 GiB there, yet 32,736 of 32,768."""
    attention = 10 * FullAttentionSpec(32, 2, 256, dtype=mx.bfloat16).page_size_bytes
    states = state_bytes(30, 32, 8192)
    needed = 32_768 // 32 * attention + states
    assert round(needed / (1 << 30), 1) == 0.7
    budget = MemoryBudget.plan(
        needed, 1.0, model_memory=0, overhead=0, per_block_bytes=attention, block_size=32, recurrent_state=states
    )
    assert round(budget.kv_budget / (1 << 30) + states / (1 << 30), 1) == 0.7
    assert budget.max_model_len(32_768) == 32_736
