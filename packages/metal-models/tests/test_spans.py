"""Rows that see each other, against attention written out in float64."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import RaggedBatch
from metal_models import MetalModelsError
from metal_models.spans import Spans

RNG = np.random.default_rng(0)


def written_out(query: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: list[int]) -> np.ndarray:
    out = np.zeros(query.shape)
    for head in range(len(query)):
        scores = keys[seen, head // 2].astype(np.float64) @ query[head] * 0.5
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[seen, head // 2] / weights.sum()
    return out


def gather(keys: np.ndarray, values: np.ndarray) -> Callable[[mx.array, int], tuple[mx.array, mx.array]]:
    return lambda table, length: (mx.array(keys[:length]), mx.array(values[:length]))


@pytest.mark.parametrize("window", [None, 3])
def test_a_row_sees_all_of_its_span_and_what_is_before(window: int | None) -> None:
    # One decode row, then a request of five rows at positions 4 to 8 whose rows 2 to 4 are a span.
    batch = RaggedBatch(
        query_start_loc=np.array([0, 1, 6], np.int32),
        seq_lens=np.array([7, 9], np.int32),
        block_table=np.zeros((2, 3), np.int32),
    )
    queries = RNG.standard_normal((6, 4, 8)).astype(np.float32)
    keys, values = RNG.standard_normal((2, 9, 2, 8)).astype(np.float32)
    spans = Spans(((2, 5),))
    found = spans.attend(mx.array(queries), gather(keys, values), batch, scale=0.5, window=window)
    for row, position, out in zip(spans.rows, (5, 6, 7), np.array(found), strict=True):
        seen = list(range(0 if window is None else position - window + 1, 8))
        np.testing.assert_allclose(out, written_out(queries[row], keys, values, seen), rtol=1e-5, atol=1e-5)


def test_some_models_have_them_in_windows_only() -> None:
    assert Spans.of([(0, 2)], "gemma3").concern(None)
    assert not Spans.of([(0, 2)], "gemma4").concern(None)
    assert Spans.of([(0, 2)], "gemma4").concern(512)
    assert not Spans.of([], "gemma3").concern(512)


def test_a_span_over_two_requests_is_refused() -> None:
    batch = RaggedBatch(
        query_start_loc=np.array([0, 2, 4], np.int32),
        seq_lens=np.array([2, 2], np.int32),
        block_table=np.zeros((2, 1), np.int32),
    )
    zeros = np.zeros((4, 1, 4), np.float32)
    with pytest.raises(MetalModelsError, match="within the rows of one request, got 1 to 3"):
        Spans(((1, 3),)).attend(mx.array(zeros), gather(zeros, zeros), batch, scale=1.0, window=None)
