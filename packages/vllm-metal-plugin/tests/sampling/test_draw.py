import mlx.core as mx
import numpy as np
import pytest

from vllm_metal_plugin.sampling.draw import draw, log_sum_exp, weights


def test_weights_are_exponentials():
    logits = -np.linspace(0, 80, 5000, dtype=np.float32)[None]
    got = np.array(weights(mx.array(logits)))
    np.testing.assert_allclose(got, np.exp(logits.astype(np.float64)), rtol=1e-5)
    assert got[0, 0] == 1.0
    assert np.array(weights(mx.array([[0.0, -float("inf")]])))[0, 1] < 2e-38


@pytest.mark.parametrize("rows", [1, 40])
def test_log_sum_exp(rows):
    logits = (np.random.default_rng(0).normal(size=(rows, 50_257)) * 5).astype(np.float32)
    expected = np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.array(log_sum_exp(mx.array(logits))), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("vocab", [1, 3, 64, 100, 640])
def test_evenly_spread_numbers_give_every_token_its_share(vocab):
    weight = np.random.default_rng(vocab).random(vocab).astype(np.float32)
    weight[::3] = 0
    weight[-1] = 1
    count = 20_000
    uniform = ((np.arange(count) + 0.5) / count).astype(np.float32)[None]
    tokens = np.array(draw(mx.array(weight[None]), mx.array(uniform)))[0]
    share = np.bincount(tokens, minlength=vocab) / count
    np.testing.assert_allclose(share, weight / weight.sum(), atol=2 / count)


def test_the_ends_of_the_interval_do_not_reach_weightless_tokens():
    weight = np.zeros((1, 300), np.float32)
    weight[0, [50, 200]] = [1e-20, 1.0]
    uniform = mx.array([[2.0**-24, 1 - 2.0**-24, 1.0]])
    assert set(np.array(draw(mx.array(weight), uniform))[0].tolist()) <= {50, 200}
