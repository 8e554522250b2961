import asyncio
import base64
import io

import numpy as np
import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector

from vllm_metal_plugin.upstream_fixes import install_in_front_end


def broken_png() -> str:
    """An image whose second chunk is no chunk."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[37:41] = b"\x00\xff\x01\xff"
    return "data:image/png;base64," + base64.b64encode(bytes(data)).decode()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/image.png", "http://127.0.0.1:9/image.png: .*127.0.0.1"),
        ("http://no-such-host.invalid/image.png", "no-such-host.invalid"),
        ("file:///etc/hostname", "--allowed-local-media-path"),
        ("data:image/png,abc", "base64"),
        (broken_png(), "image"),
    ],
)
def test_what_cannot_be_loaded_is_the_clients_fault(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    install_in_front_end()
    connector = MediaConnector()
    for load in (connector.fetch_image, lambda url: asyncio.run(connector.fetch_image_async(url))):
        with pytest.raises((VLLMValidationError, ValueError), match=reason):
            load(url)
