"""One tensor of a GGUF file as MLX arrays: affine triples where the file is quantised, else plain values."""

import math

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int64, UInt32

from metal_models.errors import UnsupportedModelError
from metal_models.gguf.blocks import AFFINE_FORMATS, GROUP_SIZE, pack
from metal_models.gguf.file import GGUFFile

_PLAIN = {"F32": "<f4", "F16": "<f2"}
_CHUNK_BYTES = 1 << 24


def read_quantized(
    file: GGUFFile, name: str, dtype: mx.Dtype, order: Int64[np.ndarray, "rows"] | None = None
) -> tuple[UInt32[mx.array, "*lead words"], Float[mx.array, "*lead groups"], Float[mx.array, "*lead groups"]]:
    """Read a tensor of a type in ``AFFINE_FORMATS`` as weight, scales and biases for MLX's affine mode.

    Args:
        file: The file.
        name: The tensor, [..., columns]; leading axes are kept.
        dtype: Of the scales and biases. float32 keeps the file's values exactly; so does float16, except
            for the scales of K-types, which it rounds.
        order: Rows to take, in the order wanted.
    """
    entry = file.tensors[name]
    form = AFFINE_FORMATS[entry.type.name]
    raw = file.rows(name)
    rows, columns = len(raw), entry.shape[-1]
    words = np.empty((rows, columns * form.bits // 32), np.uint32)
    scales = np.empty((rows, columns // GROUP_SIZE), np.float32)
    biases = np.empty_like(scales)
    step = max(1, _CHUNK_BYTES // entry.row_bytes)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        taken = raw[chunk] if order is None else raw[order[chunk]]
        blocks = np.asarray(taken).reshape(len(taken), -1, entry.type.block_bytes)
        codes, scales[chunk], biases[chunk] = form.unpack(blocks)
        words[chunk] = pack(codes.reshape(len(taken), columns), form.bits)
    lead = entry.shape[:-1]
    return (
        mx.array(words).reshape(*lead, -1),
        mx.array(scales).astype(dtype).reshape(*lead, -1),
        mx.array(biases).astype(dtype).reshape(*lead, -1),
    )


def read_dense(
    file: GGUFFile, name: str, dtype: mx.Dtype, order: Int64[np.ndarray, "rows"] | None = None
) -> Float[mx.array, "..."]:
    """Read a tensor of any type as plain values.

    Args:
        file: The file.
        name: The tensor.
        dtype: Of the result.
        order: Rows to take, in the order wanted; a one-dimensional tensor's rows are its values.

    Raises:
        UnsupportedModelError: The ``gguf`` library cannot dequantise the type.
    """
    entry = file.tensors[name]
    raw = file.rows(name)
    if entry.type.name == "BF16":
        values = mx.array(np.ascontiguousarray(raw).view("<u2")).view(mx.bfloat16)
    elif entry.type.name in _PLAIN:
        values = mx.array(np.ascontiguousarray(raw).view(_PLAIN[entry.type.name]))
    else:
        values = _dequantized(file, name, dtype)
    values = values.reshape(entry.shape).astype(dtype)
    return values if order is None else values.reshape(len(order), -1)[mx.array(order)].reshape(entry.shape)


def _dequantized(file: GGUFFile, name: str, dtype: mx.Dtype) -> mx.array:
    """Dequantise through the ``gguf`` library, some rows at a time: it works in float32."""
    from gguf import GGMLQuantizationType, dequantize

    entry = file.tensors[name]
    raw = file.rows(name)
    kind = GGMLQuantizationType[entry.type.name]
    # 16 MiB of blocks are some 100 to 300 MiB in float32.
    step = max(1, _CHUNK_BYTES // entry.row_bytes)
    try:
        parts = [
            mx.array(dequantize(np.ascontiguousarray(raw[start : start + step]), kind)).astype(dtype)
            for start in range(0, len(raw), step)
        ]
    except NotImplementedError as error:
        raise UnsupportedModelError(
            file.architecture,
            f"{name} of {file.path} is of type {entry.type.name}, which nothing here can read",
        ) from error
    mx.eval(parts)
    return mx.concatenate(parts).reshape(math.prod(entry.shape))
