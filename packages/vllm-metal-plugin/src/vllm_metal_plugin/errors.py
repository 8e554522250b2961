"""The plugin's errors, one tree.

    VllmMetalPluginError
    ├── EnvironmentVariableError   a VLLM_METAL_* variable has a value outside its allowed set
    ├── UnsupportedConfigError     vLLM was asked for something that this plugin does not do
    ├── ModelFilesError            the model's files are missing, damaged or of an unknown architecture
    ├── MultimodalError            an image, video or sound of a request cannot be computed
    ├── EngineStartError           the engine's process ended before it was ready
    └── UnsupportedRequestError    one request asks for something unsupported (request_checks.py: it needs vLLM)

None of the others is a ``ValueError``: pydantic would wrap one raised while vLLM builds its configuration into a
report of its own, and the user would have to look for our sentence in it.
"""


class VllmMetalPluginError(Exception):
    """Base of every error raised by this package."""


class EnvironmentVariableError(VllmMetalPluginError):
    """An environment variable has a value outside its allowed set."""


class UnsupportedConfigError(VllmMetalPluginError):
    """vLLM's configuration asks for something that this plugin does not do."""


class ModelFilesError(VllmMetalPluginError):
    """The model cannot be served from the files that were found."""


class MultimodalError(VllmMetalPluginError):
    """An image, video or sound of a request cannot be computed."""


class EngineStartError(VllmMetalPluginError, RuntimeError):
    """The engine's process ended before it was ready; the text is its reason."""
