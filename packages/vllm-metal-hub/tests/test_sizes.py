import pytest

from vllm_metal_hub.sizes import bytes_text


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (98_362_432, "98.4 MB"), (2.1e9, "2.1 GB"), (9e12, "9000.0 GB")]
)
def test_sizes(count, text):
    assert bytes_text(count) == text
