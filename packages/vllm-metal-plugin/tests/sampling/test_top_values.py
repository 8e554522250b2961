import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_plugin.sampling.top_values import row_max, row_sum, top_tokens, top_values


@pytest.mark.parametrize("vocab", [1, 5, 63, 1000, 4096, 9001])
@pytest.mark.parametrize("k", [1, 7, 256, 600])
def test_the_largest_entries_in_order(vocab, k):
    k = min(k, vocab)
    values = np.random.default_rng(vocab).permutation(3 * vocab).reshape(3, vocab).astype(np.float32)
    order = np.argsort(-values, axis=1)[:, :k]
    assert np.array_equal(np.array(top_tokens(mx.array(values), k)), order)
    assert np.array_equal(np.array(top_values(mx.array(values), k)), np.take_along_axis(values, order, 1))


def test_forbidden_and_equal_entries():
    values = np.full((2, 5000), -np.inf, np.float32)
    values[0, [4, 4999]] = 1.0
    values[1] = 2.0
    tokens = np.array(top_tokens(mx.array(values), 3))
    assert set(tokens[0, :2]) == {4, 4999}
    assert len(set(tokens[1])) == 3
    assert np.array(top_values(mx.array(values), 3)).tolist() == [[1.0, 1.0, -np.inf], [2.0, 2.0, 2.0]]


@pytest.mark.parametrize("vocab", [1, 64, 65, 1003])
def test_row_reductions(vocab):
    values = -np.random.default_rng(0).random((3, vocab)).astype(np.float32)
    np.testing.assert_array_equal(np.array(row_max(mx.array(values))), values.max(1, keepdims=True))
    np.testing.assert_allclose(np.array(row_sum(mx.array(values))), values.sum(1, keepdims=True), rtol=1e-5)
