"""Which part of a program each token stands in."""

from .tokens import TokenList

_TYPES = {"struct", "class", "union", "enum"}


def in_function(scope: str) -> bool:
    """Whether a token of this scope is executed code."""
    return scope in ("function", "kernel")


def mark_scopes(tokens: TokenList) -> None:
    """Set every token's ``scope``: ``file``, ``type``, ``function`` or ``kernel`` (a kernel's own body)."""
    stack = ["file"]
    start = 0  # of the declaration that a brace would open
    parentheses = 0
    for i in tokens.indices():
        token = tokens[i]
        if token.text == "}" and len(stack) > 1:
            stack.pop()
        token.scope = stack[-1]
        parentheses += (token.text == "(") - (token.text == ")")
        if token.text == "{":
            inherited = parentheses > 0 or in_function(stack[-1])
            stack.append(stack[-1] if inherited else _opened_by(tokens, start, i))
        if token.text in (";", "{", "}") and parentheses == 0:
            start = i + 1


def _opened_by(tokens: TokenList, start: int, brace: int) -> str:
    start = _after_template_head(tokens, start)
    declaration = [tokens[i].text for i in range(_after_attributes(tokens, start), brace)]
    before_parenthesis = declaration[: declaration.index("(")] if "(" in declaration else declaration
    if "=" in before_parenthesis:
        return "file"
    if _TYPES & set(before_parenthesis):
        return "type"
    if "(" not in declaration or "namespace" in declaration:
        return "file"
    return "kernel" if _is_kernel(tokens, start) else "function"


def _after_template_head(tokens: TokenList, index: int) -> int:
    while tokens[index].text == "template" and tokens[index + 1].text == "<":
        end = tokens.closing_angle(index + 1)
        if end is None:
            return index
        index = end + 1
    return index


def _after_attributes(tokens: TokenList, index: int) -> int:
    while tokens[index].text == "[[":
        index = tokens.closing(index) + 1
    return index


def _is_kernel(tokens: TokenList, start: int) -> bool:
    """Whether the declaration at ``start`` is marked ``kernel``, in either spelling."""
    end = _after_attributes(tokens, start)
    words = {tokens[i].text for i in range(start, end)}
    return "kernel" in words or "kernel" in (tokens[end].text, tokens[end + 1].text)
