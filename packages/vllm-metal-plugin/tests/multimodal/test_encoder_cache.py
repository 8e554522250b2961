import mlx.core as mx
import pytest

from metal_models.multimodal import MultimodalItem
from vllm_metal_plugin.multimodal.encoder_cache import EncoderCache


def item(length: int) -> MultimodalItem:
    return MultimodalItem("image", 0, length, None, {})


def test_an_output_stays_until_it_is_forgotten() -> None:
    runs: list[int] = []

    def encode(given: MultimodalItem) -> mx.array:
        runs.append(given.length)
        return mx.ones((given.length, 4))

    cache = EncoderCache(encode)
    for _ in range(2):
        assert cache.embeddings("a", lambda: item(3)).shape == (3, 4)
    cache.embeddings("b", lambda: item(2))
    assert runs == [3, 2]
    assert cache.nbytes == 5 * 4 * 4
    cache.forget(["a", "unknown"])
    assert "a" not in cache
    assert "b" in cache
    cache.embeddings("a", lambda: item(3))
    cache.reset()
    assert cache.nbytes == 0
    assert runs == [3, 2, 3]


def test_a_run_that_fails_leaves_nothing() -> None:
    results = iter([ValueError("broken"), mx.ones((1, 1))])

    def encode(given: MultimodalItem) -> mx.array:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    cache = EncoderCache(encode)
    with pytest.raises(ValueError, match="broken"):
        cache.embeddings("a", lambda: item(1))
    assert "a" not in cache
    assert cache.embeddings("a", lambda: item(1)).item() == 1
