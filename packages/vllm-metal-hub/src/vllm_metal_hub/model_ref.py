"""How users write a model: a path, ``owner/name``, ``hf://…``, ``ms://…``, ``@revision``, ``:QUANT``."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_metal_hub.errors import UsageError

Source = Literal["huggingface", "modelscope"]

_SCHEMES: dict[str, Source] = {"hf": "huggingface", "ms": "modelscope"}
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REF = re.compile(
    rf"^(?:(?P<scheme>hf|ms)://)?(?P<repo>{_PART}(?:/{_PART})?)"
    r"(?P<file>/[^@:]+\.gguf)?(?::(?P<quant>[A-Za-z0-9_]+))?(?:@(?P<revision>[^@:\s]+))?$"
)


@dataclass(frozen=True)
class ModelRef:
    """One parsed reference; ``path`` is set for local references and nothing else is."""

    text: str
    repo: str = ""
    source: Source | None = None
    revision: str | None = None
    quant: str | None = None
    file: str | None = None
    path: Path | None = None
    small: bool = False  # the files beside the weights only: for a tokenizer or a configuration

    @property
    def label(self) -> str:
        """The reference without scheme and revision, as servers show it."""
        if self.path is not None:
            return str(self.path)
        return self.repo + (f":{self.quant}" if self.quant else "") + (f"/{self.file}" if self.file else "")


def is_local(text: str) -> bool:
    """Tell whether ``text`` means something on this disk: it exists there, or is spelled as a path."""
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return True
    return "://" not in text and os.path.exists(text)


def parse(text: str, revision: str | None = None) -> ModelRef:
    """Parse ``text``; an explicit ``revision`` must agree with one written after ``@``.

    Raises:
        UsageError: ``text`` is no reference, or names two revisions.
    """
    if is_local(text):
        return ModelRef(text, path=Path(os.path.abspath(os.path.expanduser(text))))
    match = _REF.match(text)
    if match is None or ".." in text or "--" in match["repo"]:
        raise UsageError(
            "[model] expected a path, owner/name, hf://owner/name or ms://owner/name "
            f"(then :QUANT, @revision), got {text!r}. Check the spelling."
        )
    if revision and match["revision"] and revision != match["revision"]:
        raise UsageError(
            f"[model] expected one revision, got {match['revision']!r} in {text!r} and {revision!r}. Keep one of them."
        )
    return ModelRef(
        text,
        repo=match["repo"],
        source=_SCHEMES[match["scheme"]] if match["scheme"] else None,
        revision=revision or match["revision"],
        quant=match["quant"],
        file=match["file"][1:] if match["file"] else None,
    )
