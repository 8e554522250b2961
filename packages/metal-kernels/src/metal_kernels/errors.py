"""What this package raises."""


class MetalKernelsError(ValueError):
    """An argument that no kernel can work with; the message says what was expected."""
