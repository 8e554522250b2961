"""What the environment says about hubs, caches and the network, read once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

from vllm_metal_hub.errors import UsageError
from vllm_metal_hub.model_ref import Source

Update = Literal["never", "check", "always"]

HUGGINGFACE = "https://huggingface.co"
MODELSCOPE = "https://www.modelscope.cn"

_MODELSCOPE_DOMAINS = ("modelscope.cn", "modelscope.ai")
_TRUE = {"1", "true", "yes", "on"}

VARIABLES: dict[str, str] = {
    "VLLM_METAL_HUB_HOME": "Where manifests and ModelScope snapshots are kept (~/.cache/vllm-metal-hub).",
    "VLLM_METAL_HUB_SOURCE": "huggingface, modelscope, or both with a comma: the order to try them in.",
    "VLLM_METAL_HUB_TIMEOUT": "Seconds without an answer or a byte before a request is tried again (10).",
    "VLLM_METAL_HUB_RETRIES": "How often a request is tried before its hub is given up (5).",
    "VLLM_METAL_HUB_UPDATE": "never, check or always: whether to ask again for a branch that was pulled.",
    "VLLM_METAL_HUB_TOKEN_TO_MIRROR": "1 sends HF_TOKEN to an HF_ENDPOINT that is not huggingface.co.",
    "VLLM_METAL_HUB_ALIASES": "TOML file of names that differ between the hubs ($VLLM_METAL_HUB_HOME/aliases.toml).",
    "VLLM_METAL_HUB_RESOLVED": "Set by the first process for its children: references and their local paths.",
}


def is_true(value: str | None) -> bool:
    """Read a flag the way its users write it."""
    return (value or "").strip().lower() in _TRUE


def parse_sources(text: str, name: str = "--source") -> tuple[Source, ...]:
    """Read a failover order such as ``modelscope,huggingface``, which ``name`` was set to.

    Raises:
        UsageError: a word that names no hub.
    """
    short = {"hf": "huggingface", "ms": "modelscope"}
    words = [short.get(word.strip().lower(), word.strip().lower()) for word in text.split(",") if word.strip()]
    if not words or any(word not in get_args(Source) for word in words):
        raise UsageError(f"[{name}] expected huggingface, modelscope or both with a comma, got {text!r}. Change it.")
    return tuple(cast(list[Source], list(dict.fromkeys(words))))


def host_of(endpoint: str) -> str:
    """The host name of an address."""
    return urlsplit(endpoint).hostname or ""


def is_modelscope(endpoint: str) -> bool:
    """Tell whether an address is ModelScope's own, and no mirror."""
    host = host_of(endpoint)
    return any(host == domain or host.endswith("." + domain) for domain in _MODELSCOPE_DOMAINS)


@dataclass(frozen=True)
class HubSettings:
    """The environment as values; see ``VARIABLES`` and docs/hub.md for the names."""

    home: Path
    sources: tuple[Source, ...]
    offline: bool
    update: Update
    timeout_s: float
    retries: int
    token_to_mirror: bool
    hf_endpoint: str
    hf_cache: Path
    modelscope_endpoint: str
    modelscope_cache: Path
    modelscope_import: Path | None
    aliases: Path
    aliases_chosen: bool  # by a variable: then the file has to be there

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "HubSettings":
        """Read the environment.

        Raises:
            UsageError: a variable of ours has a value outside its set.
        """
        env = os.environ if environ is None else environ
        home = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home()) / ".cache")
        hf_home = Path(env.get("HF_HOME") or home / "huggingface").expanduser()
        own = Path(env.get("VLLM_METAL_HUB_HOME") or home / "vllm-metal-hub").expanduser()
        extra, aliases = env.get("VLLM_METAL_MODELSCOPE_CACHE"), env.get("VLLM_METAL_HUB_ALIASES")
        return cls(
            home=own,
            sources=_sources(env),
            offline=is_true(env.get("HF_HUB_OFFLINE")) or is_true(env.get("TRANSFORMERS_OFFLINE")),
            update=_update(env),
            timeout_s=_number(env, "VLLM_METAL_HUB_TIMEOUT", 10.0),
            retries=int(_number(env, "VLLM_METAL_HUB_RETRIES", 5.0)),
            token_to_mirror=is_true(env.get("VLLM_METAL_HUB_TOKEN_TO_MIRROR")),
            hf_endpoint=(env.get("HF_ENDPOINT") or HUGGINGFACE).rstrip("/"),
            hf_cache=Path(env.get("HF_HUB_CACHE") or hf_home / "hub").expanduser(),
            modelscope_endpoint=_modelscope_endpoint(env),
            modelscope_cache=Path(env.get("MODELSCOPE_CACHE") or home / "modelscope").expanduser(),
            modelscope_import=Path(extra).expanduser() if extra else None,
            aliases=Path(aliases).expanduser() if aliases else own / "aliases.toml",
            aliases_chosen=bool(aliases),
        )

    @property
    def with_code(self) -> Path:
        """Where models lie that take code from another repository."""
        return self.home / "store" / "with-code"

    def endpoint(self, source: Source) -> str:
        """The address that ``source`` is asked at."""
        return self.hf_endpoint if source == "huggingface" else self.modelscope_endpoint


def _sources(env: Mapping[str, str]) -> tuple[Source, ...]:
    text = env.get("VLLM_METAL_HUB_SOURCE")
    if text and text != "auto":
        return parse_sources(text, "VLLM_METAL_HUB_SOURCE")
    return ("modelscope",) if is_true(env.get("VLLM_USE_MODELSCOPE")) else ("huggingface",)


def _update(env: Mapping[str, str]) -> Update:
    value = env.get("VLLM_METAL_HUB_UPDATE") or "never"
    if value not in get_args(Update):
        raise UsageError(
            f"[VLLM_METAL_HUB_UPDATE] expected never, check or always, got {value!r}. Change or unset it."
        )
    return cast(Update, value)


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if value <= 0:
        raise UsageError(f"[{name}] expected a number above 0, got {text!r}. Change or unset it.")
    return value


def _modelscope_endpoint(env: Mapping[str, str]) -> str:
    domain = env.get("MODELSCOPE_ENDPOINT") or env.get("MODELSCOPE_DOMAIN") or MODELSCOPE
    return (domain if "://" in domain else f"https://{domain}").rstrip("/")
