"""Tiny checkpoints with tensors as Hugging Face names them, each beside one that has the same values as floats."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metal_models import PagedModel, load
from metal_models.loader import weight_bytes

Tensors = dict[str, np.ndarray]
# From a float matrix: the tensors that a format stores for it, by the ending of their names, and its values then.
Quantize = Callable[[str, np.ndarray], tuple[dict[str, mx.array], np.ndarray]]

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}


class Checkpoints:
    """Writes checkpoints of one tiny model below a directory, and compares what they load to."""

    def __init__(self, directory: Path, lab: SimpleNamespace, tiny: Callable[..., PagedModel]) -> None:
        self.directory = directory
        self._lab = lab
        self._tiny = tiny

    def model(self, name: str = "qwen3", **changes: Any) -> tuple[dict[str, Any], Tensors]:
        """Return a config and float tensors, experts one by one."""
        model = self._tiny(name, **(WIDE | changes))
        tensors: Tensors = {}
        for path, array in tree_flatten(model.module.parameters()):
            if ".switch_mlp." in path:
                for expert, part in enumerate(array):
                    tensors[path.replace(".switch_mlp.", f".experts.{expert}.")] = np.array(part)
            else:
                tensors[path] = np.array(array)
        return model.config, tensors

    def write(self, name: str, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
        """Write one directory."""
        path = self.directory / name
        path.mkdir()
        arrays = {key: array if isinstance(array, mx.array) else mx.array(array) for key, array in tensors.items()}
        mx.save_safetensors(str(path / "model.safetensors"), arrays)
        (path / "config.json").write_text(json.dumps(config))
        return path

    def pair(
        self, settings: dict[str, Any], quantize: Quantize, name: str = "qwen3", **changes: Any
    ) -> tuple[Path, Path]:
        """Write a quantised checkpoint and its twin in float32; the head and the router stay floats."""
        config, tensors = self.model(name, **changes)
        stored: dict[str, Any] = {}
        for key, array in tensors.items():
            if key.endswith("_proj.weight"):
                parts, tensors[key] = quantize(key.removesuffix(".weight"), array)
                stored |= {key.removesuffix(".weight") + ending: part for ending, part in parts.items()}
            else:
                stored[key] = array
        quantised = self.write("quantised", config | {"quantization_config": settings}, stored)
        return quantised, self.write("floats", config, tensors)

    def same(self, quantised: Path, floats: Path, *, tolerance: float = 2e-5) -> PagedModel:
        """Load both in float32, and compare logits and what is generated over pages with mlx-lm's tokens."""
        model, reference = load(quantised, dtype=mx.float32), load(floats)
        assert weight_bytes(quantised, dtype=mx.float32) == model.nbytes
        (prompt,) = self._lab.prompts(model.vocab_size, (13,))
        ids = mx.array([prompt])
        expected = np.array(reference.module(ids))
        np.testing.assert_allclose(np.array(model.module(ids)), expected, rtol=tolerance, atol=tolerance * 10)
        tokens, _ = self._lab.mlx_lm_tokens(reference, prompt, 5)
        server = self._lab.Server(model)
        request = server.request(prompt)
        self._lab.serve_mixed(server, [request], 5, chunk=5)
        assert request.tokens[len(prompt) :] == tokens
        return model


@pytest.fixture
def checkpoints(tmp_path: Path, lab: SimpleNamespace, tiny: Callable[..., PagedModel]) -> Checkpoints:
    return Checkpoints(tmp_path, lab, tiny)
