import numpy as np

from vllm_metal_plugin.sampling.uniforms import BLOCK, NUMBERS, request_key, uniform_block


def test_numbers_depend_on_key_and_block_alone():
    key = request_key(3)
    assert np.array_equal(uniform_block(key, 2), uniform_block(key, 2))
    assert not np.array_equal(uniform_block(key, 2), uniform_block(key, 3))
    assert not np.array_equal(uniform_block(key, 2), uniform_block(request_key(4), 2))


def test_blocks_do_not_overlap():
    numbers = np.concatenate([uniform_block(request_key(1), block).ravel() for block in range(8)])
    assert len(np.unique(numbers)) > 0.999 * len(numbers)


def test_numbers_are_uniform_and_strictly_inside_the_unit_interval():
    numbers = np.concatenate([uniform_block(request_key(1), block) for block in range(200)])
    assert numbers.shape == (200 * BLOCK, NUMBERS)
    assert numbers.dtype == np.float32
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    expected = numbers.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100


def test_any_integer_is_a_seed_and_no_seed_is_random():
    assert len({request_key(seed) for seed in (0, 1, -2, 2**63 - 1)}) == 4
    assert request_key(None) != request_key(None)
    first, second = np.random.default_rng(5), np.random.default_rng(5)
    assert request_key(None, first) == request_key(None, second)
