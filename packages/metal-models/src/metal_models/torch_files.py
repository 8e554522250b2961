"""Reads the tensors of a PyTorch checkpoint (``.bin``, ``.pt``) without PyTorch and without running what it holds.

Such a file is a zip archive of raw storages and a pickle that says which tensors lie where. Of the pickle's language
only what describes tensors is understood; anything else is refused.
"""

import collections
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_models.errors import CheckpointError

# Storage class -> element type of its bytes, and MLX's type of the same size where NumPy has no name for it.
_STORAGES: dict[str, tuple[type[np.generic], mx.Dtype | None]] = {
    "FloatStorage": (np.float32, None),
    "HalfStorage": (np.float16, None),
    "BFloat16Storage": (np.uint16, mx.bfloat16),
    "DoubleStorage": (np.float64, None),
    "LongStorage": (np.int64, None),
    "IntStorage": (np.int32, None),
    "ShortStorage": (np.int16, None),
    "CharStorage": (np.int8, None),
    "ByteStorage": (np.uint8, None),
    "BoolStorage": (np.bool_, None),
}


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(file: Path) -> dict[str, mx.array]:
    """Return the tensors of a checkpoint by name; doubles become floats.

    Raises:
        CheckpointError: It is damaged, of the format before PyTorch 1.6, or holds more than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise _refused(file, "an archive without data.pkl")
            with archive.open(pickled) as stream:
                found = _Unpickler(stream).load()
            named = dict(_tensors(found, file))
            folder = pickled.removesuffix("data.pkl")
            return {name: _read(archive, folder, tensor) for name, tensor in named.items()}
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _refused(file, str(error)) from error


def _refused(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"[load] expected a PyTorch checkpoint of tensors in {file}, got {what}. "
        "Convert it to safetensors, or download it again."
    )


def _tensors(found: Any, file: Path) -> list[tuple[str, _Tensor]]:
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(tensor, _Tensor) for tensor in found.values()):
        raise _refused(file, "something else than a dictionary of tensors")
    return [(str(name), tensor) for name, tensor in found.items()]


def _read(archive: zipfile.ZipFile, folder: str, tensor: _Tensor) -> mx.array:
    """Copy one tensor out of its storage."""
    element, wanted = _STORAGES[tensor.storage.kind]
    flat = np.frombuffer(archive.read(f"{folder}data/{tensor.storage.key}"), element)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if min((tensor.offset, *tensor.strides, *tensor.shape)) < 0 or (0 not in tensor.shape and last >= flat.size):
        raise ValueError(f"a tensor outside of its {flat.size} elements")
    strides = [stride * flat.itemsize for stride in tensor.strides]
    values = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
    if element is np.float64:
        values = values.astype(np.float32)
    array = mx.array(np.ascontiguousarray(values).reshape(tensor.shape))
    return array if wanted is None else array.view(wanted)


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors, and nothing that a pickle could name beyond them."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        label, kind, key, _location, _size = pid
        if label != "storage" or kind not in _STORAGES:
            raise pickle.UnpicklingError(f"a {label} of type {kind}")
        return _Storage(kind, str(key))


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_rest: Any) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(shape), tuple(strides))


def _rebuild_parameter(data: _Tensor, *_rest: Any) -> _Tensor:
    return data
