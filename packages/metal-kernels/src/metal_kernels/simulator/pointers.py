"""Pointers and references declared without an address space, which Metal refuses and clang does not."""

import re

_GENERIC = re.compile(r"__generic [\w:<>, ]*[*&]|__generic\s*[*&]")
_LINE = re.compile(r"(?:<stdin>|line):(\d+):\d+")
_DECLARATION = re.compile(
    r"(?:ParmVarDecl|VarDecl|FieldDecl) 0x\w+ .*?<[^>]*> \S+ (?:used |referenced )*(\w+) '([^']*)'"
)


def pointers_without_space(ast: str) -> list[tuple[int, str, str]]:
    """Line, name and type of each, from clang's AST dump of a unit read from standard input."""
    found = []
    line = 0
    for text in ast.splitlines():
        for position in _LINE.finditer(text):
            line = int(position.group(1))
        match = _DECLARATION.search(text)
        if not match or " implicit " in text:
            continue
        name, declared = match.groups()
        const_reference = "&&" in declared or ("const" in declared and "&" in declared)
        if _GENERIC.search(declared) and not const_reference:
            found.append((line, name, declared))
    return found
