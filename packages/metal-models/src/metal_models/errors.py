"""The errors that users of metal_models can meet.

::

    MetalModelsError
    ├── UnsupportedModelError   the architecture does not page; nothing is wrong with the files
    ├── CheckpointError         the files are incomplete, damaged or do not fit the architecture
    └── AdapterError            a LoRA adapter is incomplete, damaged or does not fit the model
"""


class MetalModelsError(ValueError):
    """Base of every error raised by this package."""


class UnsupportedModelError(MetalModelsError):
    """An architecture needs something the paged cache does not offer.

    Attributes:
        architecture: ``model_type`` of the model's ``config.json``.
        reason: One clause saying what is missing.
    """

    def __init__(self, architecture: str, reason: str) -> None:
        super().__init__(
            f"[load] expected an architecture that runs over the paged cache, "
            f"got {architecture!r}: {reason}. "
            "Choose a model from docs/supported-models.md."
        )
        self.architecture = architecture
        self.reason = reason


class CheckpointError(MetalModelsError):
    """A model directory is incomplete, damaged, or does not fit its own config."""


class AdapterError(MetalModelsError):
    """A LoRA adapter is incomplete, damaged, or does not fit the model."""
