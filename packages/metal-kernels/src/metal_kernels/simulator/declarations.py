"""Pre-pass, declarations: kernels, attributes, function constants and threadgroup variables."""

import re

from .kernels import THREAD_ATTRIBUTES, Instantiation, Kernel, Program, attribute_names, read_parameters
from .scopes import in_function
from .tokens import TokenList

_ATTRIBUTE = re.compile(
    r"(kernel|host_name|max_total_threads_per_threadgroup|function_constant|buffer|threadgroup|id|unroll|"
    r"maybe_unused|nodiscard|fallthrough|visible|noreturn|likely|unlikely|clang::\w+|gnu::\w+)\b"
)
_CONSTANT_TYPES = {
    *[
        "bool",
        "char",
        "uchar",
        "short",
        "ushort",
        "int",
        "uint",
        "long",
        "ulong",
        "half",
        "float",
        "int32_t",
        "uint32_t",
        "int16_t",
        "uint16_t",
    ]
}


def collect_instantiations(tokens: TokenList, program: Program) -> None:
    """Record and remove explicit instantiations of kernels."""
    for i in tokens.indices():
        if tokens[i].text == "template" and tokens[i + 1].text == "[[" and tokens[i].scope == "file":
            _collect_instantiation(tokens, i, program)


def _collect_instantiation(tokens: TokenList, start: int, program: Program) -> None:
    i, host_name = start + 1, ""
    while tokens[i].text == "[[":
        end = tokens.closing(i)
        if tokens[i + 1].text == "host_name":
            host_name = "".join(tokens[j].text.strip('"') for j in range(i + 2, end) if tokens[j].kind == "string")
        i = end + 1
    while tokens[i].text in ("kernel", "void"):
        i += 1
    if tokens[i].text == "decltype":
        i = tokens.closing(i + 1) + 1
    if tokens[i].kind == tokens[i + 1].kind == "name":  # a function type by its name
        i += 1
    end = name_end = i
    while tokens[name_end].text not in ("<", "(", ";", ""):
        name_end += 1
    name = tokens.text(i, name_end).replace(" ", "")
    arguments = ""
    end = name_end
    if tokens[name_end].text == "<":
        closing = tokens.closing_angle(name_end)
        if closing is not None:
            arguments, end = tokens.text(name_end, closing + 1), closing + 1
    while tokens[end].text not in (";", ""):
        end += 1
    program.instantiations.append(Instantiation(host_name or name, name, arguments, tokens[start].place))
    tokens.drop(start, end + 1)


def collect_kernels(tokens: TokenList, program: Program) -> None:
    """Record every kernel definition and remove the words that make it one."""
    for i in tokens.indices():
        if tokens[i].text != "kernel" or in_function(tokens[i].scope):
            continue
        opening = tokens.enclosing_attribute(i)
        function = tokens.closing(opening) if opening >= 0 else i
        while tokens[function].text not in ("(", ";", "{", ""):
            function += 1
        if tokens[function].text != "(":
            continue
        if tokens[function - 2].text != "void":
            program.error(tokens[i].place, "a kernel must return void")
        name = tokens[function - 1].text
        start = _declaration_start(tokens, i)
        kernel = Kernel(name, read_parameters(tokens, function, program), "template" in tokens.names(start, i))
        limit = re.search(
            r"max_total_threads_per_threadgroup \( (\d+) \)|max_total_threads_per_threadgroup\((\d+)\)",
            tokens.text(start, function),
        )
        if limit:
            kernel.max_threads = min(1024, int(limit.group(1) or limit.group(2)))
        program.kernels[name] = kernel
        if tokens[i - 1].text != "[[":
            tokens[i].text = ""


def _declaration_start(tokens: TokenList, index: int) -> int:
    while index > 0 and tokens[index - 1].text not in (";", "{", "}"):
        index -= 1
    return index


def remove_attributes(tokens: TokenList, program: Program) -> None:
    """Check the name of every ``[[...]]`` and remove it."""
    i = 0
    while i < len(tokens):
        if tokens[i].text != "[[" or not _is_attribute(tokens, i):
            i += 1
            continue
        end = tokens.closing(i)
        for attribute in attribute_names(tokens.text(i + 1, end)):
            if attribute.split("(")[0].strip() not in THREAD_ATTRIBUTES and not _ATTRIBUTE.match(attribute):
                program.error(tokens[i].place, f"unknown attribute '{attribute}'")
        tokens.drop(i, end + 1)
        i = end + 1


def _is_attribute(tokens: TokenList, index: int) -> bool:
    # a[[...]] cannot be an index: Metal has no lambdas.
    return tokens[index + 1].kind == "name"


def set_function_constants(tokens: TokenList, program: Program, values: dict[str, str]) -> None:
    """Give every ``constant T x [[function_constant(n)]];`` its value, 0 by default, and say which have one."""
    for i in tokens.indices():
        if tokens[i].text == "is_function_constant_defined" and tokens[i + 1].text == "(":
            end = tokens.closing(i + 1)
            tokens[i].text = "true" if tokens.text(i + 2, end) in values else "false"
            tokens.drop(i + 1, end + 1)
    for i in tokens.indices():
        if tokens[i].text != "[[" or tokens[i + 1].text != "function_constant" or tokens[i].scope != "file":
            continue
        start = _declaration_start(tokens, i)
        words = [w for w in tokens.names(start, i) if w not in ("constant", "constexpr", "const", "static")]
        if tokens[start].text == "(" or len(words) != 2 or "constant" not in tokens.names(start, i):
            continue
        if words[0] not in _CONSTANT_TYPES:
            program.error(tokens[i].place, f"type '{words[0]}' is not valid for a function constant")
        end = tokens.closing(i)
        if tokens[end + 1].text != ";":
            program.error(tokens[i].place, "a function constant cannot have an initializer")
        tokens.drop(i, end + 1)
        tokens[i].text = f"= {values.get(words[1], '0')}"


def _take_alignments(tokens: TokenList) -> dict[int, str]:
    """Remove the ``alignas(n)`` beside each ``threadgroup``; n, by the identity of that token."""
    alignments = {}
    for i in tokens.indices():
        if tokens[i].text != "alignas" or not in_function(tokens[i].scope):
            continue
        end = tokens.closing(i + 1)
        for beside in (i - 1, end + 1):
            if tokens[beside].text == "threadgroup":
                alignments[id(tokens[beside])] = tokens.text(i + 2, end)
                tokens.drop(i, end + 1)
                break
    tokens.compact()
    return alignments


def place_threadgroup_variables(tokens: TokenList, program: Program) -> None:
    """Turn ``threadgroup T x[N];`` into a reference to the threadgroup's memory."""
    alignments = _take_alignments(tokens)
    number = 0
    for i in tokens.indices():
        if tokens[i].text != "threadgroup" or not in_function(tokens[i].scope):
            continue
        if tokens[i - 1].text not in (
            ";",
            "{",
            "}",
            ")",
            ":",
            "static",
            "const",
            "constexpr",
            "volatile",
            "alignas",
        ):
            continue
        declared = _variable(tokens, i)
        if declared is None:
            continue
        end, element, declarators = declared
        if tokens[i].scope != "kernel":
            program.error(tokens[i].place, "threadgroup variables can only be declared in a kernel's own body")
        parts = []
        for declarator in declarators:
            alignment = alignments.get(id(tokens[i]), "1")
            parts.append(_reference(element, declarator[0], "".join(declarator[1:]), f"{number}u, ({alignment})"))
            number += 1
        if tokens[i - 1].text in ("static", "const"):
            tokens[i - 1].text = ""
        tokens.drop(i, end)
        tokens[i].text = " ".join(parts)


def _reference(element: str, name: str, dimensions: str, which: str) -> str:
    if not dimensions:
        return f"threadgroup {element}& {name} = metal::msl_threadgroup<{element}, {which}>();"
    alias = f"msl_variable_{name}"
    return (
        f"typedef {element} {alias}{dimensions}; "
        f"threadgroup {alias}& {name} = metal::msl_threadgroup<{alias}, {which}>();"
    )


def _variable(tokens: TokenList, index: int) -> tuple[int, str, list[list[str]]] | None:
    """End, element type and declarators of the variables declared at ``index``; None for pointers and the like."""
    groups: list[list[str]] = [[]]
    i, depth = index + 1, 0
    while tokens[i].text != ";":
        text = tokens[i].text
        if text == "=" and depth == 0 and tokens[i + 1].text == "{":
            i = tokens.closing(i + 1) + 1  # Metal takes an initializer and ignores it
            continue
        if text in ("", "{", "}", "(", "=") or (depth == 0 and text in ("*", "&")):
            return None
        if text == "[":
            closing = tokens.closing(i)
            groups[-1].append("[" + tokens.text(i + 1, closing) + "]")
            i = closing + 1
            continue
        depth += (text == "<") - (text == ">")
        if text == "," and depth == 0:
            groups.append([])
        else:
            groups[-1].append(text)
        i += 1
    first = groups[0]
    name_at = next((k - 1 for k, text in enumerate(first) if text.startswith("[")), len(first) - 1)
    element = " ".join(word for word in first[:name_at] if word not in ("const", "volatile"))
    return i, element, [first[name_at:], *groups[1:]]
