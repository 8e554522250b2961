"""What a plan says from a config alone is what the pool then takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from metal_kv import CacheLayout, KVCachePool, LatentSpec, MemoryBudget, RecurrentStateSpec, SpecError, bytes_per_block
from metal_models import UnsupportedModelError
from metal_models.capacity import cache_groups, converted_weight_bytes

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


@pytest.mark.parametrize(
    ("settings", "bits_per_weight"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 16),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, 8.25),
        ({"quant_method": "awq", "group_size": 32}, 5),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False}, 8.25),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 4.25),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, 16),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
    ],
)
def test_converted_weights(lab: SimpleNamespace, settings: dict[str, Any], bits_per_weight: float) -> None:
    config = lab.read_config("qwen3") | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    linear = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
    rest = 2 * 128 * 128 + 128 + 4 * (2 * 128 + 2 * 32)
    expected = converted_weight_bytes(config | {"quantization_config": settings}, dtype=mx.bfloat16)
    assert expected == linear * bits_per_weight / 8 + 2 * rest


def test_other_weights_are_as_they_are_stored(lab: SimpleNamespace) -> None:
    assert converted_weight_bytes(lab.read_config("qwen3"), dtype=mx.bfloat16) is None
