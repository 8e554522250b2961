"""Pre-pass, methods: those that need their object to be the thread's own say so.

In Metal every method without an address space is ``thread``. To clang it is generic: then its members cannot go where
``thread`` is asked for. But clang calls methods marked ``thread`` on no value that a function returns. So the mark is
written where a body needs it, and dropped elsewhere.
"""

from dataclasses import dataclass

from .tokens import Token, TokenList

_TYPES = {"struct", "class", "union"}
_SPACES = {"thread", "device", "threadgroup", "constant"}
_NO_METHOD = {"static", "friend", "typedef", "using", "static_assert", "enum"} | _TYPES
_SPECIFIERS = {"alignas", "decltype", "__attribute__", "explicit"}  # may have arguments of their own
_AFTER_PARAMETERS = {"{", ";", "const", "volatile", "->", "="} | _SPACES
# Metal's own functions that write to an argument.
_WRITING = {"sincos", "modf", "frexp", "simdgroup_load", "simdgroup_multiply", "simdgroup_multiply_accumulate"}
_WRITING |= {"atomic_compare_exchange_weak_explicit", "thread_elements"}


@dataclass
class _Method:
    """Positions: of the declaration, of the parentheses of its parameters, of its bodies, of its address spaces."""

    name: str
    start: int
    opening: int
    closing: int
    bodies: list[range]
    spaces: list[int]


def mark_methods(tokens: TokenList) -> None:
    """Mark the methods that need it ``thread``, and those only."""
    methods = _methods(tokens)
    if not methods:
        return
    asks = _WRITING | _functions_with_thread_parameters(tokens)
    outside = _defined_outside(tokens)
    for method in methods:
        method.bodies += [body for _, body in outside.get(method.name, ())]
    pending = methods
    needing: list[_Method] = []
    while True:
        rest: list[_Method] = []
        before = len(needing)
        for method in pending:
            (needing if _needs_thread(tokens, method, asks) else rest).append(method)
        pending = rest
        if len(needing) == before:
            break
        asks |= {method.name for method in needing[before:]}
    marked = {method.name for method in needing}
    needing += [method for method in pending if method.name in marked & outside.keys()]
    for method in pending:
        for i in method.spaces:
            if tokens[i].text == "thread" and method.name not in outside:
                tokens[i].text = ""
    ends = [method.closing for method in needing if not method.spaces]
    ends += [end for name in marked & outside.keys() for end, _ in outside[name]]
    for end in sorted(ends, reverse=True):
        tokens.insert(end + 1, Token("name", "thread", " ", tokens[end].place, tokens[end].scope))
    tokens.compact()


def _functions_with_thread_parameters(tokens: TokenList) -> set[str]:
    openings = {tokens.enclosing(i) for i in tokens.indices() if tokens[i].text == "thread"}
    return {tokens[i - 1].text for i in openings if i > 0 and tokens[i].text == "(" and tokens[i - 1].kind == "name"}


def _defined_outside(tokens: TokenList) -> dict[str, list[tuple[int, range]]]:
    """Methods defined outside their struct without a space, by name: where their parameters end, and their bodies."""
    ends: dict[str, list[tuple[int, range]]] = {}
    for i in tokens.indices():
        if tokens[i].text == "::" and tokens[i].scope == "file":
            name = tokens[i + 1].text
            opening = i + 2
            if name == "operator" and tokens[opening].text == "(":
                opening += 2
            elif name == "operator":
                name += tokens[opening].text
                opening += 1
            if tokens[opening].text != "(":
                continue
            end = tokens.closing(opening)
            after = end + 2 if tokens[end + 1].text == "const" else end + 1
            if tokens[after].text == "{":
                ends.setdefault(name, []).append((end, range(after, tokens.closing(after))))
            elif tokens[after].text in _SPACES:
                ends.setdefault(name, [])
    return ends


def _needs_thread(tokens: TokenList, method: _Method, asks: set[str]) -> bool:
    if any(tokens[i].text == "thread" for i in range(method.start, method.opening)):
        return True
    for i in (i for body in method.bodies for i in body):
        if tokens[i].text == "thread" or (tokens[i].text in asks and tokens[i + 1].text in ("(", "<")):
            return True
    return False


def _methods(tokens: TokenList) -> list[_Method]:
    names = {tokens[i + 1].text for i in tokens.indices() if tokens[i].text in _TYPES}
    methods: list[_Method] = []
    start = i = 0
    while i < len(tokens):
        text = tokens[i].text
        if text in (";", "{", "}") or (text == ":" and tokens[i - 1].text in ("public", "private", "protected")):
            start = i + 1
        elif tokens[i].scope == "type" and text == "template" and tokens[i + 1].text == "<":
            i = tokens.closing_angle(i + 1) or i
            start = i + 1
        elif tokens[i].scope == "type" and text == "[[":
            i = tokens.closing(i)
        elif tokens[i].scope == "type" and text == "(":
            if tokens[i - 1].text in _SPECIFIERS:
                i = tokens.closing(i)
            else:
                i = start = _after_declarator(tokens, start, i, names, methods)
                continue
        i += 1
    return methods


def _after_declarator(tokens: TokenList, start: int, opening: int, names: set[str], methods: list[_Method]) -> int:
    """Where the body or the end is of what is declared from ``start`` on; if it is a method, add it."""
    end = tokens.closing(opening)
    if tokens[opening - 1].text == "operator" and tokens[end + 1].text == "(":
        end = tokens.closing(end + 1)
    spaces = []
    i = end + 1
    while tokens[i].text not in ("{", ";", "}", ""):
        if tokens[i].text in _SPACES:
            spaces.append(i)
        i = tokens.closing(i) + 1 if tokens[i].text == "(" else i + 1
    before = [tokens[k].text for k in range(start, opening)]
    if tokens[end + 1].text in _AFTER_PARAMETERS and _is_method(before, names):
        bodies = [range(i, tokens.closing(i))] if tokens[i].text == "{" else []
        name = "".join(before[before.index("operator") :]) if "operator" in before else before[-1]
        methods.append(_Method(name, start, opening, end, bodies, spaces))
    return i


def _is_method(before: list[str], names: set[str]) -> bool:
    """Whether ``before`` a parenthesis is the declaration of a method that Metal calls on an object."""
    if len(before) < 2 or _NO_METHOD & set(before):
        return False
    if "operator" in before:
        after = before[before.index("operator") + 1 :]
        is_conversion = bool(after) and (after[0].isidentifier() or after[0] == "::")
        return after != ["="] and not is_conversion
    return before[-1].isidentifier() and before[-1] not in names and "~" not in before and "=" not in before
