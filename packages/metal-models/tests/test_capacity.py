"""What a plan says from a config alone is what the pool then takes."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_kv import CacheLayout, KVCachePool, MemoryBudget, bytes_per_block, group_layers, unify_page_sizes
from metal_models import PagedModel, UnsupportedModelError
from metal_models.registry import build

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.json"))
BLOCK_SIZE = 16


@pytest.mark.parametrize("name", FAMILIES)
def test_planned_bytes_are_allocated_bytes(lab, name):
    config = lab.read_config(name)
    try:
        model = PagedModel(build(config), config)
    except UnsupportedModelError:
        pytest.skip("does not page")
    groups = group_layers(unify_page_sizes(model.kv_cache_specs(BLOCK_SIZE)))
    budget = MemoryBudget.plan(
        64 << 20,
        0.5,
        model_memory=model.nbytes,
        overhead=0,
        per_block_bytes=bytes_per_block(groups),
        block_size=BLOCK_SIZE,
        kv_budget_limit=16 << 20,
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    pool = KVCachePool(CacheLayout.from_groups(groups, budget.num_blocks))
    allocated = mx.get_active_memory() - before
    assert allocated == pytest.approx(budget.num_blocks * budget.per_block_bytes, rel=0.02)
    assert allocated == pytest.approx(budget.kv_budget, abs=budget.per_block_bytes + 0.02 * budget.kv_budget)
    assert pool.nbytes == budget.num_blocks * budget.per_block_bytes
