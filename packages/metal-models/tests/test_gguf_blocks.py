import gguf
import mlx.core as mx
import numpy as np
import pytest

from metal_models.gguf.blocks import AFFINE_FORMATS, pack
from metal_models.gguf.file import TENSOR_TYPES

TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}
# Where a block's float16 numbers are; the rest of a block may be any bytes.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    """Rows of random blocks with sensible scales: uint8 [rows, bytes]."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (rows, blocks, TYPES[name].block_bytes), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        halves = rng.normal(size=(rows, blocks, 1)).astype(np.float16)
        data[..., at : at + 2] = halves.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", AFFINE_FORMATS)
def test_codes_scales_and_biases_are_the_files_values(name):
    rows = random_blocks(name, 3, 4)
    wanted = gguf.dequantize(rows, gguf.GGMLQuantizationType[name])

    blocks = rows.reshape(3, -1, TYPES[name].block_bytes)
    codes, scales, biases = AFFINE_FORMATS[name].unpack(blocks)
    packed = pack(codes.reshape(3, -1), AFFINE_FORMATS[name].bits)
    got = mx.dequantize(
        mx.array(packed), mx.array(scales), mx.array(biases), group_size=32, bits=AFFINE_FORMATS[name].bits
    )

    np.testing.assert_allclose(np.array(got), wanted, rtol=1e-6, atol=1e-5)


def test_sizes_are_those_of_the_gguf_library():
    for number, kind in TENSOR_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == kind.name
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        assert (values, size) == (kind.block_values, kind.block_bytes)
