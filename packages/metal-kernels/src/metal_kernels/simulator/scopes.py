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
    for i in tokens.indices():
        token = tokens[i]
        if token.text == "}" and len(stack) > 1:
            stack.pop()
        token.scope = stack[-1]
        if token.text == "{":
            stack.append(stack[-1] if in_function(stack[-1]) else _opened_by(tokens, start, i))
        if token.text in (";", "{", "}"):
            start = i + 1


def _opened_by(tokens: TokenList, start: int, brace: int) -> str:
    start = _after_template_head(tokens, start)
    declaration = [tokens[i].text for i in range(start, brace)]
    before_parenthesis = declaration[: declaration.index("(")] if "(" in declaration else declaration
    if "=" in before_parenthesis:
        return "file"
    if _TYPES & set(before_parenthesis):
        return "type"
    if "(" not in declaration or "namespace" in declaration:
        return "file"
    return "kernel" if is_kernel_declaration(tokens, start, brace) else "function"


def _after_template_head(tokens: TokenList, index: int) -> int:
    while tokens[index].text == "template" and tokens[index + 1].text == "<":
        end = tokens.closing_angle(index + 1)
        if end is None:
            return index
        index = end + 1
    return index


def is_kernel_declaration(tokens: TokenList, start: int, stop: int) -> bool:
    """Whether the declaration in ``[start, stop)`` is marked ``kernel``, in either spelling."""
    for i in range(start, stop):
        if tokens[i].text == "(":
            return False
        if tokens[i].text == "kernel":
            return True
    return False
