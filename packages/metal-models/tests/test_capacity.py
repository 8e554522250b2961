"""What a plan says from a config alone is what the pool then takes."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_kv import CacheLayout, KVCachePool, LatentSpec, MemoryBudget, RecurrentStateSpec, SpecError, bytes_per_block
from metal_models import UnsupportedModelError
from metal_models.capacity import cache_groups

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.json"))
FORMATS = [(mx.bfloat16, None), (mx.bfloat16, "int8")]


@pytest.mark.parametrize("name", FAMILIES)
def test_planned_bytes_are_allocated_bytes(lab, name):
    config = lab.read_config(name)
    for dtype, element in FORMATS:
        try:
            groups = cache_groups(config, dtype=dtype, key=element, value=element)
        except UnsupportedModelError:
            pytest.skip("does not page")
        except SpecError:  # latents, tiny heads, or nothing but states
            assert element is not None
            continue
        budget = MemoryBudget.plan(
            64 << 20,
            0.5,
            model_memory=0,
            overhead=0,
            per_block_bytes=bytes_per_block(groups),
            block_size=16,
            kv_budget_limit=16 << 20,
        )
        mx.clear_cache()
        before = mx.get_active_memory()
        pool = KVCachePool(CacheLayout.from_groups(groups, budget.num_blocks))
        allocated = mx.get_active_memory() - before
        assert allocated == pytest.approx(budget.num_blocks * budget.per_block_bytes, rel=0.02)
        assert allocated == pytest.approx(budget.kv_budget, abs=budget.per_block_bytes + 0.02 * budget.kv_budget)
        assert pool.nbytes == budget.num_blocks * budget.per_block_bytes
        del pool


def test_the_models_dtype_is_the_caches(lab):
    config = lab.read_config("llama")
    wide, narrow = (bytes_per_block(cache_groups(config, dtype=dtype)) for dtype in (mx.float32, mx.bfloat16))
    assert wide == 2 * narrow


@pytest.mark.parametrize(("name", "kind"), [("deepseek_v3", LatentSpec), ("qwen3_next", RecurrentStateSpec)])
def test_latents_and_states_are_planned(lab, name, kind):
    groups = cache_groups(lab.read_config(name), dtype=mx.bfloat16)
    assert any(isinstance(spec, kind) for group in groups for spec in group.specs)
