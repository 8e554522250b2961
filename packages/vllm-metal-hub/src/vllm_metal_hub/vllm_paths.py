"""References resolved for vLLM: with its kind of errors, and progress where a server logs."""

import sys

from rich.console import Console

from vllm_metal_hub.errors import HubError
from vllm_metal_hub.pull_display import PullDisplay
from vllm_metal_hub.resolver import Profile, resolve
from vllm_metal_hub.snapshot import LocalSnapshot
from vllm_metal_plugin.errors import ModelFilesError


def local_path(reference: str, revision: str | None, *, small: bool = False) -> str | None:
    """Resolve for the plugin, whose errors vLLM's front end prints without a traceback.

    ``small`` leaves out the weights. Progress goes to the error stream.

    Raises:
        ModelFilesError: with the text of the HubError behind it.
    """
    return str(resolved(reference, revision, "small" if small else "auto").path)


def resolved(reference: str, revision: str | None, profile: Profile) -> LocalSnapshot:
    """Resolve with progress on the error stream; errors are the plugin's kind, with the HubError as their cause."""
    try:
        with PullDisplay(Console(file=sys.stderr, highlight=False), reference) as display:
            return resolve(reference, revision=revision, profile=profile, on_event=display)
    except HubError as error:
        raise ModelFilesError(str(error)) from error
