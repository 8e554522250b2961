"""Doctor's checks of the hubs: which are in force, whether they answer and how fast, where tokens would go."""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from vllm_metal_hub.doctor_checks import Check
from vllm_metal_hub.errors import UsageError
from vllm_metal_hub.model_ref import Source
from vllm_metal_hub.settings import HUGGINGFACE, MODELSCOPE, HubSettings, host_of, is_modelscope

BUDGET_S = 3.0
_BOTH: tuple[Source, ...] = ("huggingface", "modelscope")
_NAMES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}


def hub_checks() -> Iterator[Check]:
    """One line for each hub, the order they are asked in, and tokens."""
    try:
        settings = HubSettings.from_env()
    except UsageError as error:
        yield Check("Hubs", "fail", str(error), "Correct the variable.")
        return
    if settings.offline:
        yield Check("Hubs", "ok", "HF_HUB_OFFLINE is set: no hub is asked")
        return
    yield Check("Order", "ok", ", then ".join(_NAMES[source] for source in settings.sources))
    for source in _BOTH:
        yield _reachable(source, settings)
    yield from _tokens(settings)


def _reachable(source: Source, settings: HubSettings) -> Check:
    endpoint = settings.endpoint(source)
    mirror = "" if endpoint in (HUGGINGFACE, MODELSCOPE) else " (a mirror that you chose)"
    used = source in settings.sources
    started = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=BUDGET_S):
            pass
    except urllib.error.HTTPError:
        pass  # any answer is an answer
    except OSError as error:
        reason = getattr(error, "reason", error)
        advice = "Check the network and proxy, or choose another hub or mirror; models already here still work."
        if not used:
            return Check(_NAMES[source], "ok", f"not asked; {endpoint}{mirror} does not answer here")
        return Check(_NAMES[source], "warn", f"{endpoint}{mirror} does not answer: {reason}", advice)
    spent_ms = (time.monotonic() - started) * 1000
    return Check(_NAMES[source], "ok", f"{endpoint}{mirror} answers in {spent_ms:.0f} ms")


def _tokens(settings: HubSettings) -> Iterator[Check]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    yield _token(
        "Hugging Face", bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file(), settings.hf_endpoint,
        host_of(settings.hf_endpoint) == host_of(HUGGINGFACE) or settings.token_to_mirror,
    )  # fmt: skip
    yield _token(
        "ModelScope", bool(os.environ.get("MODELSCOPE_API_TOKEN")), settings.modelscope_endpoint,
        is_modelscope(settings.modelscope_endpoint) or settings.token_to_mirror,
    )  # fmt: skip


def _token(hub: str, present: bool, endpoint: str, sent: bool) -> Check:
    """Whether there is a token and where it would go; never the token."""
    where = "would go to" if sent else "would not go to"
    found = f"there is one; it {where} {endpoint}" if present else "none: public models only"
    return Check(f"{hub} token", "ok", found)
