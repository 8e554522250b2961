"""Groups that vLLM makes of our specs, and the ones metal_kv foretells."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from metal_kv import (
    FullAttentionSpec,
    KVCacheSpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
    bytes_per_block,
    group_layers,
    max_blocks_per_request,
    quantize_specs,
)
from vllm_metal_plugin.kv_cache import planned_groups

FULL = FullAttentionSpec(16, 2, 64, dtype=mx.float32)
WIDE = FullAttentionSpec(16, 2, 128, dtype=mx.float32)
WINDOW = SlidingWindowSpec(16, 4, 64, dtype=mx.float32, sliding_window=64)
NARROW = SlidingWindowSpec(16, 2, 64, dtype=mx.float32, sliding_window=64)
STATE = RecurrentStateSpec(16, ((4, 8),), (mx.float32,), page_size_padded=FULL.page_size_bytes)
MODELS = {
    "all alike": [FULL] * 4,
    "two head sizes": [FULL, WIDE, FULL, WIDE],
    "windows of the same page": [FULL, NARROW] * 3,
    "windows of larger pages": [FULL, WINDOW, WINDOW, WINDOW] * 2,
    "nearly as many of each": [FULL, NARROW] * 3 + [FULL],
    "an odd number of windows": [NARROW] * 5 + [FULL] * 2,
    "states": [STATE, STATE, STATE, FULL] * 2,
}


@pytest.fixture(scope="module")
def vllm_config(model_dir: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(model_dir), max_model_len=256, max_num_batched_tokens=64).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # what the engine agrees on with the worker
    return config


@pytest.mark.parametrize("formats", [(None, None), ("int8", "int8"), ("int8", "int4")], ids=str)
@pytest.mark.parametrize("kinds", MODELS.values(), ids=MODELS)
def test_groups_are_those_that_vllm_makes(
    vllm_config: Any, kinds: list[KVCacheSpec], formats: tuple[Any, Any]
) -> None:
    specs = quantize_specs({str(i): spec for i, spec in enumerate(kinds)}, *formats)
    if formats[0] and STATE in kinds:  # the worker pads states after quantising
        page = next(spec.page_size_bytes for spec in specs.values() if spec != STATE)
        padded = RecurrentStateSpec(16, STATE.shapes, STATE.dtypes, page_size_padded=page)
        specs = {name: padded if spec == STATE else spec for name, spec in specs.items()}
    planned, foretold = planned_groups(vllm_config, specs), group_layers(specs)
    assert bytes_per_block(planned) == bytes_per_block(foretold)
    assert sorted(group.layer_names for group in planned) == sorted(group.layer_names for group in foretold)
    for num_tokens in (1, 100, 256):
        needed = [max_blocks_per_request(groups, num_tokens, 128) for groups in (planned, foretold)]
        assert needed[0] == needed[1]
