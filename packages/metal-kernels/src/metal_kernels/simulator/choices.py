"""Pre-pass, ``c ? a : b`` of structs and ``a < b`` of vectors, whose results clang takes for something else."""

from .scopes import in_function
from .tokens import Token, TokenList

_CLASSES = {"struct", "class", "union", "complex64_t", "array", "bool2", "bool3", "bool4"}
_ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<="}
_STATEMENT = {";", "{", "}"}
_BEFORE_CONDITION = _STATEMENT | _ASSIGNMENTS | {"(", "[", ",", "return", "?", ":", ""}
_AFTER_CHOICE = _STATEMENT | _ASSIGNMENTS | {")", "]", ",", ":", ""}
_OPENING, _CLOSING = {"(", "[", "{", "[["}, {")", "]", "}", "]]"}


def rewrite_choices(tokens: TokenList) -> None:
    """Where a unit has structs, both operands of ``?:`` become values."""
    if not any(_is_class(token.text) for token in tokens):
        return
    inserted: list[tuple[int, str]] = []
    for i in tokens.indices():
        if tokens[i].text != "?" or not in_function(tokens[i].scope) or _needs_no_value(tokens, i):
            continue
        colon = _colon(tokens, i)
        if colon is None:
            continue
        for start, stop in ((i + 1, colon), (colon + 1, _end(tokens, colon + 1))):
            if stop - start > 1 or (tokens[start].kind == "name" and tokens[start].text != "nullptr"):
                inserted += [(start, "metal::msl_value"), (start, "("), (stop, ")")]
    _insert(tokens, inserted)


def _insert(tokens: TokenList, inserted: list[tuple[int, str]]) -> None:
    """Put each text before the token at its index; texts for one index keep their order."""
    for i, text in sorted(reversed(inserted), key=lambda item: item[0], reverse=True):
        kind = "name" if len(text) > 1 else "operator"
        tokens.insert(i, Token(kind, text, " " if kind == "name" else "", tokens[i].place, tokens[i].scope))


def rewrite_comparisons(tokens: TokenList, names: set[str]) -> None:
    """A comparison that is converted, or whose lanes are read, becomes what Metal has: a vector of bool."""
    inserted: list[tuple[int, str]] = []
    for i in tokens.indices():
        if tokens[i].text != "(" or not in_function(tokens[i].scope):
            continue
        end = tokens.closing(i)
        is_converted = tokens[i - 1].text in names or (tokens[i - 1].text == ")" and tokens[i - 2].text in names)
        if (is_converted or tokens[end + 1].text in (".", "[")) and _is_comparison(tokens, i + 1, end):
            inserted += [(i + 1, "metal::msl_compared"), (i + 1, "("), (end, ")")]
    _insert(tokens, inserted)


def _is_comparison(tokens: TokenList, start: int, stop: int) -> bool:
    found = False
    i = start
    while i < stop:
        text = tokens[i].text
        if text in _OPENING:
            i = tokens.closing(i)
        elif text == "<" and (end := tokens.closing_angle(i)) is not None and tokens[end + 1].text in ("(", "::", "{"):
            i = end
        elif text in ("<", ">", "<=", ">=", "==", "!="):
            found = True
        elif text in ("?", ",", "&&", "||") or text in _ASSIGNMENTS:
            return False
        i += 1
    return found


def _is_class(text: str) -> bool:
    return text in _CLASSES or text.startswith(
        ("packed_", "float2x", "float3x", "float4x", "half2x", "half3x", "half4x")
    )


def _needs_no_value(tokens: TokenList, question: int) -> bool:
    """Whether the choice is a statement, a template argument, or something that is assigned to or referred to."""
    i = question - 1
    while i > 0 and tokens[i].text not in _BEFORE_CONDITION:
        i = tokens.opening(i) if tokens[i].text in _CLOSING else i
        i -= 1
    before = tokens[i].text
    if _is_template_argument(tokens, question):
        return True
    if before == "=":
        return tokens[i - 2].text == "&"
    if before == "(":
        closing = tokens.closing(i)
        return tokens[i - 1].text == "&" or tokens[closing + 1].text in _ASSIGNMENTS
    return before in _STATEMENT


def _is_template_argument(tokens: TokenList, question: int) -> bool:
    i = question - 1
    while i > 0 and tokens[i].text not in _STATEMENT | _OPENING:
        if tokens[i].text == "<" and tokens[i - 1].kind == "name":
            end = tokens.closing_angle(i)
            if end is not None and end > question:
                return True
        i = tokens.opening(i) if tokens[i].text in _CLOSING else i
        i -= 1
    return False


def _colon(tokens: TokenList, question: int) -> int | None:
    depth, i = 0, question + 1
    while tokens[i].text not in _STATEMENT and tokens[i].text not in ("", ")", "]"):
        if tokens[i].text in _OPENING:
            i = tokens.closing(i)
        elif tokens[i].text == "?":
            depth += 1
        elif tokens[i].text == ":":
            if depth == 0:
                return i
            depth -= 1
        i += 1
    return None


def _end(tokens: TokenList, start: int) -> int:
    """Where the last operand, which may be a choice itself, ends."""
    depth, i = 0, start
    while depth or tokens[i].text not in _AFTER_CHOICE:
        text = tokens[i].text
        if text in _OPENING:
            i = tokens.closing(i)
        elif text == "<" and tokens[i - 1].kind == "name":
            end = tokens.closing_angle(i)
            i = end if end is not None and tokens[end + 1].text in ("(", "::", "{") else i
        depth += (text == "?") - (text == ":")
        i += 1
    return i
