"""The vllm-metal command line, and one local snapshot per launch."""

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_metal_hub.snapshot import LocalSnapshot

__version__ = version("vllm-metal-hub")
__all__ = ["resolve", "register_general"]


def resolve(ref: str, *, revision: str | None = None) -> "LocalSnapshot":
    """Return the one local, complete snapshot that ``ref`` means; see ``vllm_metal_hub.resolver``."""
    from vllm_metal_hub.resolver import resolve as resolve_once

    return resolve_once(ref, revision=revision)


def register_general() -> None:
    """Entry point of vLLM's general plugins: model ids become local paths before the engine is configured."""
    from vllm_metal_hub.vllm_plugin import register

    register()
