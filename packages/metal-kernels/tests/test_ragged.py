"""What a ragged batch says about its step, and what it refuses."""

import numpy as np
import pytest

from metal_kernels import MetalKernelsError, RaggedBatch


def batch(starts, seq_lens, columns=2):
    table = np.ones((len(seq_lens), columns), np.int32)
    return RaggedBatch(np.array(starts, np.int32), np.array(seq_lens, np.int32), table)


def test_counts():
    mixed = batch([0, 1, 2, 7, 8], [4, 9, 5, 1])
    assert (mixed.num_reqs, mixed.num_tokens, mixed.num_decodes) == (4, 8, 2)
    assert (mixed.max_query_len, mixed.max_seq_len) == (5, 9)
    assert mixed.query_lens.tolist() == [1, 1, 5, 1]


def test_empty_batch():
    empty = batch([0], [])
    assert (empty.num_reqs, empty.num_tokens, empty.num_decodes, empty.max_seq_len) == (0, 0, 0, 0)


@pytest.mark.parametrize("requests", [1, 20])
def test_device_twins_are_flat_and_never_tiny(requests):
    twin = batch(range(requests + 1), [3] * requests).on_device("seq_lens")
    assert twin.tolist() == [3] * requests + [0] * max(0, 8 - requests)


def test_shared_work_is_done_once():
    step, calls = batch([0, 1], [3]), []
    assert [step.once("key", lambda: calls.append(1) or "built") for _ in range(3)] == ["built"] * 3
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("starts", "seq_lens", "message"),
    [
        ([0, 1, 2], [3], "expected 2 row starts"),
        ([1, 2], [3], "start at 0 and never fall"),
        ([0, 4, 2], [5, 5], "start at 0 and never fall"),
        ([0, 4], [3], "seq_lens to include the step's rows"),
    ],
)
def test_refuses_contradictions(starts, seq_lens, message):
    with pytest.raises(MetalKernelsError, match=message):
        batch(starts, seq_lens)


def test_one_row_each():
    assert batch_of([1, 1, 1], [4, 1, 9]).one_row_each
    assert not batch_of([1, 2, 0], [4, 2, 9]).one_row_each
    decode = batch_of([1, 1], [4, 9])
    assert decode.query_lens.tolist() == [1, 1]
    assert (decode.num_decodes, decode.max_query_len, decode.num_tokens) == (2, 1, 2)


def test_the_same_rows_over_other_blocks():
    batch = batch_of([1, 3], [4, 9])
    kept = batch.once("a", lambda: "own")
    other = batch.with_blocks(np.array([[7, 8, 9], [4, 5, 6]], np.int32))
    assert other.block_table.tolist() == [[7, 8, 9], [4, 5, 6]]
    assert other.query_lens.tolist() == [1, 3]
    assert other.once("a", lambda: "other") == "other"
    assert batch.once("a", lambda: "new") == kept
    with pytest.raises(MetalKernelsError, match="2 rows"):
        batch.with_blocks(np.zeros((3, 1), np.int32))


def batch_of(query_lens, seq_lens):
    starts = np.cumsum([0, *query_lens]).astype(np.int32)
    return RaggedBatch(starts, np.array(seq_lens, np.int32), np.ones((len(seq_lens), 4), np.int32))
