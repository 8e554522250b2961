"""The short form of limits on the command line."""

import re
from collections.abc import Callable
from typing import Any


def accept_short_limits(parser: Any) -> None:
    """Let ``--limit-mm-per-prompt image=0,audio=0`` mean what it did before vLLM took only JSON; safe to repeat."""
    for action in parser._actions:  # noqa: SLF001  argparse has no other way to find an option
        if "--limit-mm-per-prompt" in action.option_strings and not isinstance(action.type, _ShortLimits):
            action.type = _ShortLimits(action.type)


class _ShortLimits:
    """Parses a list of counts, and leaves other texts to vLLM's parser."""

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self._parse = parse

    def __call__(self, text: str) -> Any:
        if re.fullmatch(r"\w+=\d+(,\w+=\d+)*", text):
            return {name: int(count) for name, _, count in (part.partition("=") for part in text.split(","))}
        return self._parse(text)
