"""Embeddings and coordinates that rows of a step take."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_kv import AttentionMetadata, CacheGroup, CacheLayout, KVCachePool
from metal_models import MetalModelsError, PagedModel
from metal_models.decode_families import decode_program
from metal_models.program_step import bound_step
from metal_models.row_inputs import RopeSections, RowEmbeddings, rope_sections

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}


def forward(model: PagedModel, ids: list[int], **inputs: Any) -> mx.array:
    specs = model.kv_cache_specs(4)
    pool = KVCachePool(CacheLayout.from_groups([CacheGroup(tuple(specs), tuple(specs.values()))], 8))
    table = np.arange(1, 5, dtype=np.int32)[None]
    hidden = model.forward(
        mx.array(ids, mx.int32), [AttentionMetadata.build([0, len(ids)], [len(ids)], table, 4)], pool, **inputs
    )
    mx.eval(hidden, pool.arrays())
    return hidden


@pytest.mark.parametrize(("interleaved", "expected"), [(False, [0, 0, 0, 1, 1, 2, 2]), (True, [0, 1, 2, 0, 1, 2, 0])])
def test_coordinates_of_frequencies(interleaved: bool, expected: list[int]) -> None:
    assert RopeSections((3, 2, 2), interleaved).coordinates().tolist() == expected


def test_sections_of_configs() -> None:
    assert rope_sections({"text_config": MROPE}) == RopeSections((4, 2, 2), interleaved=False)
    assert rope_sections({"rope_scaling": {"mrope_section": [1, 2, 3], "mrope_interleaved": True}}) == RopeSections(
        (1, 2, 3), interleaved=True
    )
    assert rope_sections({"rope_theta": 1e4}) is None


def test_a_tokens_own_embedding_changes_nothing(tiny: Callable[..., PagedModel]) -> None:
    model, ids = tiny("llama"), [5, 6, 7, 8]
    plain = forward(model, ids)
    values = model.module.model.embed_tokens(mx.array([6, 8]))
    taken = forward(model, [5, 99, 7, 99], embeddings=RowEmbeddings(np.array([1, 3], np.int32), values))
    np.testing.assert_allclose(np.array(taken), np.array(plain), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.array(forward(model, ids)), np.array(plain))


def test_three_equal_coordinates_are_one_position(tiny: Callable[..., PagedModel]) -> None:
    model, ids = tiny("qwen3", **MROPE), [5, 6, 7, 8]
    same = forward(model, ids, rope_positions=mx.array([[0, 1, 2, 3]] * 3, mx.int32))
    np.testing.assert_allclose(np.array(same), np.array(forward(model, ids)), rtol=1e-5, atol=1e-5)
    other = forward(model, ids, rope_positions=mx.array([[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]], mx.int32))
    assert np.abs(np.array(other) - np.array(same)).max() > 1e-3


def test_further_parts_are_added_after_the_first_layers(tiny: Callable[..., PagedModel]) -> None:
    model, ids = tiny("llama"), [5, 6, 7]
    own = model.module.model.embed_tokens(mx.array([6]))
    row = np.array([1], np.int32)
    silent = RowEmbeddings(row, mx.concatenate([own, mx.zeros((1, 128))], axis=1))
    plain = forward(model, ids)
    np.testing.assert_allclose(np.array(forward(model, ids, embeddings=silent)), np.array(plain), rtol=1e-5, atol=1e-5)
    heard = forward(model, ids, embeddings=RowEmbeddings(row, mx.concatenate([own, mx.ones((1, 128))], axis=1)))
    np.testing.assert_array_equal(np.array(heard[0]), np.array(plain[0]))
    assert np.abs(np.array(heard[1:]) - np.array(plain[1:])).max() > 1e-3


def test_fused_decode_turns_heads_by_the_positions_that_it_is_given(tiny: Callable[..., PagedModel]) -> None:
    model = tiny("qwen3_vl")
    specs = model.kv_cache_specs(4)
    pools = [KVCachePool(CacheLayout.from_groups([CacheGroup(tuple(specs), tuple(specs.values()))], 8)) for _ in "ab"]
    program = decode_program(model.module)
    assert program is not None
    step = bound_step(program, [pools[1].layer(name) for name in specs], compiled=False)
    tables = np.array([[1, 2], [3, 4]], np.int32)
    prompt = AttentionMetadata.build([0, 3, 5], [3, 2], tables, 4)
    for pool in pools:
        mx.eval(model.forward(mx.array([5, 6, 7, 8, 9]), [prompt], pool), pool.arrays())
    shifted = AttentionMetadata.build([0, 1, 2], [4, 3], tables, 4).at(np.array([1, 6], np.int32))
    ids = mx.array([10, 11], mx.int32)
    plain, fused = model.forward(ids, [shifted], pools[0]), step(ids, [shifted])
    np.testing.assert_allclose(np.array(fused), np.array(plain), rtol=1e-3, atol=1e-3)


def test_a_model_that_cannot_take_them_says_so(tiny: Callable[..., PagedModel], lab: SimpleNamespace) -> None:
    model = tiny("llama")
    with pytest.raises(MetalModelsError, match="without mrope_section"):
        forward(model, [1, 2], rope_positions=mx.zeros((3, 2), mx.int32))
    with pytest.raises(MetalModelsError, match="multiple of 64 elements, got 32"):
        forward(model, [1, 2], embeddings=RowEmbeddings(np.array([0], np.int32), mx.zeros((1, 32))))
    wrong = tiny("qwen3", rope_parameters={**MROPE["rope_parameters"], "mrope_section": [1, 1, 1]})
    with pytest.raises(MetalModelsError, match="sum up to 8"):
        forward(wrong, [1, 2], rope_positions=mx.zeros((3, 2), mx.int32))
