"""What Metal refuses and clang does not, found in clang's syntax tree of a unit read from standard input."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from .toolchain import MSL_HEADERS

_GENERIC = re.compile(r"__generic [\w:<>, ]*[*&]|__generic\s*[*&]")
_LINE = re.compile(r"(?:<stdin>|line):(\d+):\d+")
_DECLARATION = re.compile(
    r"(?:ParmVarDecl|VarDecl|FieldDecl) 0x\w+ .*?<[^>]*> \S+ (?:used |referenced )*(\w+) '([^']*)'"
)
_FUNCTION = re.compile(
    r"^(\W*)(?:FunctionDecl|CXXMethodDecl|CXXConstructorDecl) (0x\w+) "
    r"(?:parent 0x\w+ )?(?:prev (0x\w+) )?.*?([\w~]+) '"
)
_REFERENCE = re.compile(r"DeclRefExpr .* (?:Function|CXXMethod) (0x\w+)|MemberExpr .* (?:\.|->)\w+ (0x\w+)$")
_METHOD = re.compile(r"MemberExpr .*'<bound member function type>' (?:\.|->)(\w+) 0x")
_OTHER_SPACE = re.compile(r"'[^']*__(global|local) [^']*'")
_VECTOR = re.compile(r"'[^'*]*ext_vector_type\(\d\)[^'*]*'")
_SPACES = {"global": "device", "local": "threadgroup"}
_GLOBAL = re.compile(r"VarDecl 0x.* (\w+) 'const __constant [^']*'(?:\S* )* ?(?:callinit|cinit|listinit|static)")
_CALLED = re.compile(r"DeclRefExpr .* Function (0x\w+) '([\w]+)'")
LAMBDA = "LambdaExpr "


def violations(ast: str, metal_version: tuple[int, int]) -> list[tuple[int, str]]:
    """Line and complaint of each violation of Metal's rules."""
    numbered = list(_numbered(ast.splitlines()))
    rules = [_pointers_without_space, _methods_of_other_spaces, _choices_between_lanes, _recursions, _initializers]
    if metal_version < (3, 2):
        rules.append(_lambdas)
    return [violation for rule in rules for violation in rule(numbered)]


def _numbered(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Each line of the tree with the source line that it, or what encloses it, begins at."""
    line = 0
    for text in lines:
        for position in _LINE.finditer(text):
            line = int(position.group(1))
        yield line, text


def _depth(text: str) -> int:
    """How deep in the tree a line of it is."""
    return len(text) - len(text.lstrip("|`- "))


def _pointers_without_space(tree: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for line, text in tree:
        match = _DECLARATION.search(text)
        if not match or " implicit " in text:
            continue
        name, declared = match.groups()
        const_reference = "&&" in declared or ("const" in declared and "&" in declared)
        if _GENERIC.search(declared) and not const_reference:
            yield line, f"'{name}' of type '{declared}' needs an address space"


def _methods_of_other_spaces(tree: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Calls of methods without an address space, which are for objects of the thread's own only."""
    for (line, text), (_, cast), (_, called_on) in zip(tree, tree[1:], tree[2:], strict=False):
        method = _METHOD.search(text)
        if not method or "<AddressSpaceConversion>" not in cast:
            continue
        space = _OTHER_SPACE.search(called_on)
        if space and method.group(1) != "operator":
            words = _SPACES[space.group(1)]
            yield line, f"method '{method.group(1)}' is not marked '{words}', but its object is in that address space"


def _lambdas(tree: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for line, text in tree:
        if LAMBDA in text:
            yield line, "lambda expressions do not exist in Metal before 3.2"


def _choices_between_lanes(tree: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for (line, text), (_, condition) in pairwise(tree):
        if "ConditionalOperator " in text and _VECTOR.search(condition):
            yield line, "the condition of ?: cannot be a vector; use select()"


def _recursions(tree: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    calls: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    declared: dict[str, tuple[int, str]] = {}
    inside, depth = "", 0
    for line, text in tree:
        if _depth(text) <= depth:
            inside = ""
        function = _FUNCTION.search(text)
        if function:
            indent, identity, previous, name = function.groups()
            depth = len(indent)
            inside = first[identity] = first.get(previous or "", previous or identity)
            if " implicit_instantiation " in text:  # ends where its arguments say
                inside = ""
                continue
            declared.setdefault(inside, (line, name))
        reference = _REFERENCE.search(text)
        if reference and inside:
            calls.setdefault(inside, set()).add(reference.group(1) or reference.group(2))
    called = {caller: {first.get(c, c) for c in callees} for caller, callees in calls.items()}
    for function_id, (line, name) in declared.items():
        if function_id in _reached(function_id, called):
            yield line, f"'{name}' calls itself: recursion does not exist in Metal"


def _reached(start: str, called: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    pending = list(called.get(start, ()))
    while pending:
        function = pending.pop()
        if function not in seen:
            seen.add(function)
            pending += called.get(function, ())
    return seen


def _initializers(tree: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Variables in constant memory whose value is only known when a function has run."""
    not_constant = {
        function.group(2)
        for _, text in tree
        if (function := _FUNCTION.search(text)) and not re.search(r" constexpr\b| implicit_instantiation ", text)
    }
    name, depth = "", 0
    for line, text in tree:
        indent = _depth(text)
        if indent <= depth:
            name = ""
        if not name and (variable := _GLOBAL.search(text)):
            name, depth = variable.group(1), indent
        called = _CALLED.search(text) if name else None
        if called and (called.group(2) in _mathematics() or called.group(1) in not_constant):
            yield (
                line,
                f"'{name}' is in constant memory: expected a constant expression, got a call of '{called.group(2)}'",
            )


@cache
def _mathematics() -> frozenset[str]:
    """Functions of floating-point numbers that no constant expression can call."""
    return frozenset(re.findall(r"MSL_MATH[123]\((\w+),", (MSL_HEADERS / "math.h").read_text()))
