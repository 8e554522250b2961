"""The attention backend that vLLM sees; it answers questions about block sizes and never computes."""

from typing import Any, NoReturn

from vllm.v1.attention.backend import AttentionBackend, MultipleOf


class SyntheticBackend(AttentionBackend):  # type: ignore[misc]
    """Stands for attention that happens inside MLX models."""

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's logs."""
        return "MLX_PAGED"

    @staticmethod
    def get_impl_cls() -> NoReturn:
        """Torch attention layers cannot run on this platform."""
        raise NotImplementedError(
            "[attention] expected MLX models, got a torch attention layer. Report this as a bug."
        )

    @staticmethod
    def get_builder_cls() -> NoReturn:
        """Torch attention layers cannot run on this platform."""
        raise NotImplementedError(
            "[attention] expected MLX models, got a torch attention layer. Report this as a bug."
        )

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        """Any multiple of eight tokens."""
        return [MultipleOf(8)]
