"""Metal source as a list of tokens that can be edited without losing their lines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import KernelCompileError
from .places import Place

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f\v\\\n]+)
    |(?P<marker>^\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<number>\.?\d(?:[\w.]|(?<=[eEpP])[+-])*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<operator>\[\[|\]\]|::|->\*|->|<<=|>>=|<<|[-+*/%&|^=!<>]=|&&|\|\||\+\+|--|\.\.\.|.)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_MARKER = re.compile(r'#\s*(?:line\s+)?(\d+)\s+"([^"]*)"')
_CLOSING = {"(": ")", "[": "]", "{": "}", "[[": "]]"}


@dataclass(slots=True)
class Token:
    """One token; passes change ``text``, and blank it to drop the token.

    ``space`` is what stood before it; ``scope`` is filled in by `scopes.mark_scopes`.
    """

    kind: str
    text: str
    space: str
    place: Place
    scope: str = ""


_BEYOND = 8  # empty tokens at the end, so that looking a few tokens ahead or behind needs no tests


class TokenList(list[Token]):
    """The tokens of one preprocessed unit, followed by a few empty ones."""

    def __init__(self, text: str) -> None:
        super().__init__(_with_single_brackets(_tokenize(text)))
        self._pad("\n")

    def _pad(self, space: str) -> None:
        self.extend(Token("end", "", space if k == 0 else "", Place("<end>", 0)) for k in range(_BEYOND))

    def indices(self) -> range:
        """The positions of the real tokens."""
        return range(len(self) - _BEYOND)

    def text(self, start: int, stop: int) -> str:
        """The tokens of ``[start, stop)`` with the space between them, in one line."""
        parts = [(" " if t.space else "") + t.text for t in self[start:stop] if t.text]
        return "".join(parts).strip()

    def names(self, start: int, stop: int) -> list[str]:
        """The identifiers in ``[start, stop)``."""
        return [t.text for t in self[start:stop] if t.kind == "name"]

    def closing(self, index: int) -> int:
        """Index of the bracket that closes the one at ``index``.

        Raises:
            KernelCompileError: There is none.
        """
        opening = self[index].text
        closing, depth = _CLOSING[opening], 0
        for i in range(index, len(self)):
            text = self[i].text
            if text == opening:
                depth += 1
            elif text == closing:
                depth -= 1
                if depth == 0:
                    return i
        raise KernelCompileError(f"{self[index].place}: error: '{opening}' is never closed")

    def closing_angle(self, index: int) -> int | None:
        """Index of the ``>`` that closes the template list opened at ``index``; None if ``<`` compares."""
        depth = 0
        i = index
        while i < len(self):
            text = self[i].text
            if text in ("(", "["):
                i = self.closing(i)
            elif text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if depth == 0:
                    return i
            elif text in (";", "{", "}", ")", "]", "&&", "||", ">="):
                return None
            i += 1
        return None

    def opening(self, index: int) -> int:
        """Index of the bracket that the one at ``index`` closes, or -1."""
        closing, depth = self[index].text, 0
        opening = {v: k for k, v in _CLOSING.items()}[closing]
        for i in range(index, -1, -1):
            text = self[i].text
            if text == closing:
                depth += 1
            elif text == opening:
                depth -= 1
                if depth == 0:
                    return i
        return -1

    def enclosing(self, index: int) -> int:
        """Index of the innermost bracket that is still open at ``index``, or -1."""
        depth = 0
        for i in range(index - 1, -1, -1):
            text = self[i].text
            if text in (")", "]", "}"):
                depth += 1
            elif text in ("(", "[", "{"):
                if depth == 0:
                    return i
                depth -= 1
        return -1

    def enclosing_attribute(self, index: int) -> int:
        """Index of the ``[[`` around ``index``, or -1."""
        while index >= 0 and self[index].text not in ("[[", "]]", ";", "{", "}"):
            index -= 1
        return index if index >= 0 and self[index].text == "[[" else -1

    def drop(self, start: int, stop: int) -> None:
        """Blank the tokens of ``[start, stop)``; their lines stay."""
        for token in self[start:stop]:
            token.text = ""

    def compact(self) -> None:
        """Remove blanked tokens, keeping their line breaks."""
        kept: list[Token] = []
        pending = ""
        for token in self:
            if not token.text:
                pending += token.space
                continue
            if pending:
                token.space, pending = pending + token.space, ""
            kept.append(token)
        self[:] = kept
        self._pad(pending or "\n")

    def render(self) -> tuple[str, list[Place]]:
        """The text, and the place of each of its lines (index 0: line 1)."""
        parts: list[str] = []
        places: list[Place] = []
        for token in self:
            breaks = token.space.count("\n")
            if breaks:
                places.extend([token.place] * breaks)
            parts += (token.space, token.text)
            if "\n" in token.text:
                places.extend([token.place] * token.text.count("\n"))
        places.insert(0, self[0].place)
        return "".join(parts), places


def _with_single_brackets(tokens: Iterator[Token]) -> Iterator[Token]:
    """``]]`` closes an attribute, or is two brackets: ``a[b[i]]``."""
    opened: list[str] = []
    for token in tokens:
        if token.text in ("[", "[["):
            opened.append(token.text)
        elif token.text in ("]", "]]") and opened:
            if token.text == "]]" and opened[-1] == "[":
                opened[-2:] = []
                yield Token(token.kind, "]", token.space, token.place)
                yield Token(token.kind, "]", "", token.place)
                continue
            opened.pop()
        yield token


def _tokenize(text: str) -> Iterator[Token]:
    file, line, space = "<source>", 1, ""
    place = Place(file, line)  # one for all tokens of a line
    for match in _TOKEN.finditer(text):
        kind, part = match.lastgroup or "", match.group()
        if kind == "marker":
            marker = _MARKER.match(part)
            if marker:
                file, line = marker.group(2), int(marker.group(1)) - 1
            continue
        if kind == "space":
            space += part
        else:
            if place.line != line or place.file != file:
                place = Place(file, line)
            yield Token(kind, part, space, place)
            space = ""
        line += part.count("\n")
