"""Pre-pass, expressions: Metal's vector syntax, casts and address-space words that clang reads otherwise."""

import re
from functools import cache

from .kernels import Program
from .scopes import in_function
from .tokens import TokenList
from .toolchain import MSL_HEADERS

_ELEMENTS = [
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
    "bfloat",
    "bool",
]
VECTORS = {f"{element}{size}" for element in _ELEMENTS for size in (2, 3, 4)}
_SPACES = {"device", "threadgroup", "constant", "thread"}
_FORBIDDEN = {
    *[
        "double",
        "goto",
        "asm",
        "__asm__",
        "throw",
        "try",
        "catch",
        "typeid",
        "dynamic_cast",
        "thread_local",
        "alloca",
        "_Float16",
        "__fp16",
        "__int128",
    ],
    *[
        "__global",
        "__local",
        "__private",
        "__constant",
        "__generic",
        "__kernel",
        "__global__",
        "__shared__",
        "__device__",
    ],
}
_OPENCL_WORDS = {
    *[
        "local",
        "global",
        "generic",
        "private",
        "pipe",
        "read_only",
        "write_only",
        "read_write",
        "event_t",
        "queue_t",
        "clk_event_t",
    ],
    *["reserve_id_t", "sampler_t", "image1d_t", "image2d_t", "image3d_t"],
}
# clang's own functions that need no processor and no library of the host's; MLX's headers call some.
_BUILTINS = re.compile(
    r"__builtin_((clz|ctz|ffs|popcount|parity|clrsb)(g|l|ll|s)?|bswap(16|32|64)|bitreverse(8|16|32|64)|bit_cast|"
    r"(add|sub|mul)_overflow|expect|expect_with_probability|assume|unreachable|constant_p|offsetof|"
    r"inff|nanf|huge_valf|convertvector|shufflevector|astype)"
)
_FLOAT = re.compile(r"(?!0[xX])(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")  # without a suffix: not a double
_NOT_BEFORE_TYPE = {
    ".",
    "->",
    "operator",
    "struct",
    "class",
    "union",
    "enum",
    "using",
    "~",
    "typename",
    "typedef",
}
_VALUE_END = {")", "]", ">"}


def check_words(tokens: TokenList, program: Program) -> None:
    """Refuse words that Metal does not have, and rename those that only OpenCL reserves."""
    names_of_headers = _names_of_headers()
    for i in tokens.indices():
        token = tokens[i]
        if token.kind == "number" and token.text.lower().endswith("bf") and not token.text.lower().startswith("0x"):
            token.text = f"((bfloat){token.text[:-2]}f)"
        elif token.kind == "number" and _FLOAT.fullmatch(token.text):
            token.text += "f"
        if token.kind != "name":
            continue
        if token.text == "long" and tokens[i + 1].text == "long":
            program.error(token.place, "'long long' does not exist in Metal")
        if token.text in _FORBIDDEN:
            program.error(token.place, f"'{token.text}' does not exist in Metal")
            token.text = "msl_no_" + token.text.strip("_")
        elif token.text in _OPENCL_WORDS and not (token.text == "private" and tokens[i + 1].text == ":"):
            token.text = f"msl_{token.text}"
        elif (
            token.text in ("virtual", "new")
            or (token.text == "noexcept" and tokens[i - 1].text not in (")", "const", *_SPACES))
            or (token.text == "delete" and tokens[i - 1].text != "=")
            or (token.text.startswith("__builtin_") and not _BUILTINS.fullmatch(token.text))
            or token.text in names_of_headers
        ):
            program.error(token.place, f"'{token.text}' does not exist in Metal")


@cache
def _names_of_headers() -> frozenset[str]:
    """The names that this package's own headers add to Metal's."""
    texts = [path.read_text() for path in MSL_HEADERS.glob("*.h")]
    return frozenset(name for text in texts for name in re.findall(r"\b(?:msl_|Msl|MSL_)\w+", text))


def type_names(tokens: TokenList) -> set[str]:
    """Names that may stand for a vector or a scalar: vector types, their aliases and template type parameters."""
    names = set(VECTORS) | {"bfloat", "bfloat16_t"}
    for i in tokens.indices():
        text = tokens[i].text
        if text == "using" and tokens[i + 2].text == "=":
            j = i + 3
            while tokens[j].text in ("metal", "::", "typename"):
                j += 1
            if tokens[j].text == "vec" or (tokens[j].text in names and tokens[j + 1].text == ";"):
                names.add(tokens[i + 1].text)
        elif text == "typedef":
            names |= _typedef_name(tokens, i)
        elif text in ("typename", "class") and tokens[i - 1].text in ("<", ",") and tokens[i + 1].kind == "name":
            names.add(tokens[i + 1].text)
    return names


def _typedef_name(tokens: TokenList, index: int) -> set[str]:
    end = index
    while tokens[end].text not in (";", "{", ""):
        end += 1
    words = tokens.names(index, end)
    is_vector = "vec" in words or (len(words) > 1 and words[1] in VECTORS)
    return {words[-1]} if is_vector and tokens[end - 1].kind == "name" else set()


def name_bool_vectors(tokens: TokenList) -> None:
    """``vec<bool, N>`` by its other name: the template itself has no vectors of bool."""
    for i in tokens.indices():
        if tokens[i].text == "vec" and [tokens[i + k].text for k in (0, 1, 2, 3, 5)] == ["vec", "<", "bool", ",", ">"]:
            tokens[i].text = f"bool{tokens[i + 4].text}"
            tokens.drop(i + 1, i + 6)
            if tokens[i - 1].text == "::" and tokens[i - 2].text == "metal":
                tokens.drop(i - 2, i)
    tokens.compact()


def refer_to_functions(tokens: TokenList) -> None:
    """Pointers to functions, which are parameters of templates, become references: clang can bind those there."""
    for i in tokens.indices():
        if tokens[i].text == "template" and tokens[i + 1].text == "<":
            end = tokens.closing_angle(i + 1) or i
        elif tokens[i].text in ("typedef", "using") and tokens[i].scope == "file":
            end = i + 8
        else:
            continue
        for k in range(i + 2, end):
            following = [tokens[k + n].text for n in range(5)]
            if ["(", "*", ")", "("] in (following[:4], following[:2] + following[3:]):
                tokens[k + 1].text = "&"


def drop_coherent(tokens: TokenList) -> None:
    """Drop ``coherent(scope)`` from declarations of device memory."""
    for i in tokens.indices():
        if tokens[i].text == "coherent" and tokens[i + 1].text == "(" and tokens[i + 3].text == ")":
            tokens.drop(i, i + 4)
        elif tokens[i].text == "coherent" and "device" in (tokens[i + 1].text, tokens[i - 1].text):
            tokens[i].text = ""
    tokens.compact()


def qualify_constants(tokens: TokenList) -> None:
    """``constant`` implies const; a static member's definition outside its class says nothing new."""
    for i in tokens.indices():
        if tokens[i].text != "constant":
            continue
        if tokens[i].scope == "file" and tokens[i - 1].text in (";", "}", ""):
            end = i
            while tokens[end].text not in (";", "{", "(", "=", ""):
                end += 1
            name = end - 1
            while tokens[name].text == "]":
                name = tokens.opening(name) - 1
            # `constant T S<..>::x;`
            if tokens[end].text == ";" and tokens[name - 1].text == "::":
                tokens.drop(i, end + 1)
                continue
        if tokens[i - 1].text not in (")", "const") and tokens[i + 1].text != "const":
            tokens[i].text = "const constant"


def drop_thread_words(tokens: TokenList) -> None:
    """Drop ``thread`` where clang cannot bind what Metal binds.

    Those are const references, constructors, conversions, what an assignment returns, and a second address space.
    """
    structs = {tokens[i + 1].text for i in tokens.indices() if tokens[i].text in ("struct", "class", "union")}
    for i in tokens.indices():
        if tokens[i].text == "thread" and (
            _is_const_reference(tokens, i)
            or _qualifies_constructor(tokens, i, structs)
            or _is_result_of_operator(tokens, i)
            or _qualifies_pointer(tokens, i)
        ):
            tokens[i].text = ""
    tokens.compact()


def _is_const_reference(tokens: TokenList, index: int) -> bool:
    const = tokens[index - 1].text == "const"
    i = index + 1
    while True:
        text = tokens[i].text
        if text == "<":
            end = tokens.closing_angle(i)
            if end is None:
                return False
            i = end
        elif text == "const":
            const = True
        elif text == "&":
            return const
        elif text not in ("::",) and tokens[i].kind != "name":
            return False
        i += 1


def _qualifies_pointer(tokens: TokenList, index: int) -> bool:
    """Whether this is the ``thread`` of ``thread const device T* p[n];``: where the pointers are."""
    i = index + 1
    while tokens[i].text in ("const", "volatile"):
        i += 1
    return tokens[i].text in ("device", "constant", "threadgroup")


def _is_result_of_operator(tokens: TokenList, index: int) -> bool:
    if tokens[index].scope != "type":
        return False
    i = index + 1
    while tokens[i].kind == "name" or tokens[i].text in ("<", ">", "::", ","):
        i += 1
    return tokens[i].text == "&" and tokens[i + 1].text == "operator" and tokens[i + 2].text == "="


def _qualifies_constructor(tokens: TokenList, index: int, structs: set[str]) -> bool:
    parenthesis = index - 1
    if tokens[parenthesis].text == "const":
        parenthesis -= 1
    if tokens[parenthesis].text != ")":
        return False
    i = tokens.opening(parenthesis) - 1
    if tokens[i].text in structs and tokens[i - 1].text != ".":
        return True
    while i >= 0 and tokens[i].text not in (";", "{", "}"):
        if tokens[i].text == "operator":
            return tokens[i + 1].kind == "name" or tokens[i + 1].text == "="
        i -= 1
    return False


def rewrite_casts(tokens: TokenList, program: Program, names: set[str]) -> None:
    """``static_cast<T>(x)`` and ``(T)x`` convert vectors, and half to bfloat; pointers need an address space."""
    for i in tokens.indices():
        text = tokens[i].text
        if text in ("static_cast", "reinterpret_cast", "const_cast") and tokens[i + 1].text == "<":
            end = tokens.closing_angle(i + 1)
            if end is None:
                continue
            pointer = tokens[end - 1].text in ("*", "&")
            if pointer and not _SPACES & set(tokens.text(i + 2, end).split()):
                program.error(tokens[i].place, f"cast to '{tokens.text(i + 2, end)}' needs an address space")
            if text == "static_cast" and not pointer and tokens[i + 2].text != "void":
                tokens[i].text = "metal::msl_static_cast"
        elif text == "(" and tokens[i + 1].text in names and tokens[i + 2].text == ")" and _starts_cast(tokens, i):
            tokens[i].text = f"metal::msl_cast_to<{tokens[i + 1].text}>()->*"
            tokens.drop(i + 1, i + 3)
        elif text == "(" and in_function(tokens[i].scope) and tokens[i + 1].kind == "name":
            _check_pointer_cast(tokens, i, program)


def _starts_cast(tokens: TokenList, index: int) -> bool:
    before, after = tokens[index - 1], tokens[index + 3]
    if before.text in _VALUE_END or before.text in ("sizeof", "alignof", "decltype"):
        return False
    if before.kind == "name" and before.text not in ("return", "case", "else"):
        return False
    return after.kind in ("name", "number", "string") or after.text in ("(", "-", "+", "!", "~", "*")


def _check_pointer_cast(tokens: TokenList, index: int, program: Program) -> None:
    end = tokens.closing(index)
    if tokens[end - 1].text != "*" or tokens[index - 1].kind == "name" or tokens[index - 1].text in _VALUE_END:
        return
    is_type = all(tokens[j].kind == "name" or tokens[j].text in ("*", "::") for j in range(index + 1, end))
    if is_type and not _SPACES & set(tokens.text(index + 1, end).split()):
        program.error(tokens[index].place, f"cast to '{tokens.text(index + 1, end)}' needs an address space")


def rewrite_constructors(tokens: TokenList, names: set[str]) -> None:
    """``float4(a, b)``, ``vec<T, 4>(a)``, ``T(a)`` and ``float2 v(a, b);`` become calls that convert as Metal does."""
    for i in tokens.indices():
        if tokens[i].kind != "name" or tokens[i - 1].text in _NOT_BEFORE_TYPE:
            continue
        if tokens[i].text == "vec" and tokens[i + 1].text == "<":
            _rewrite_vec(tokens, i)
        elif tokens[i].text in names:
            _rewrite_named(tokens, i)


def _rewrite_vec(tokens: TokenList, index: int) -> None:
    end = tokens.closing_angle(index + 1)
    if end is None or tokens[end + 1].text != "(":
        return
    if tokens[index - 1].text == "::" and tokens[index - 2].text == "metal":
        tokens.drop(index - 2, index)
    if tokens[index - 1].text in _NOT_BEFORE_TYPE:
        return
    tokens[index].text = "metal::msl_make<metal::vec"
    tokens[end].text = ">>"


def _rewrite_named(tokens: TokenList, index: int) -> None:
    name, before = tokens[index].text, tokens[index - 1].text
    executed = in_function(tokens[index].scope) or before in ("=", "(", ",", "{", "return")
    if tokens[index + 1].text == "(" and before != "::":
        if executed and not _is_declarator(tokens, index + 1):
            tokens[index].text = f"metal::msl_make<{name}>"
    elif in_function(tokens[index].scope) and name in VECTORS and tokens[index + 1].kind == "name":
        _rewrite_variable(tokens, index)


def _is_declarator(tokens: TokenList, opening: int) -> bool:
    """Whether the parentheses are those of ``T (*f)(..)`` or ``T (&x)[n]``."""
    closes = tokens[opening + 3].text == ")" or (
        tokens[opening + 1].text in ("*", "&") and tokens[opening + 2].text == ")"
    )
    return tokens[opening + 1].text in ("*", "&") and closes and tokens[opening + 4].text in ("(", "[")


def _rewrite_variable(tokens: TokenList, index: int) -> None:
    """Rewrite the initializers of the vectors declared at ``index``: ``float2 v(a, b), w = {c};``."""
    vector, name = tokens[index].text, index + 1
    while tokens[name].kind == "name":
        end = _rewrite_initializer(tokens, vector, name + 1)
        if tokens[end].text != ",":
            break
        name = end + 1


def _rewrite_initializer(tokens: TokenList, vector: str, after: int) -> int:
    """Where the declarator ends whose name stands before ``after``."""
    opening = after + 1 if tokens[after].text == "=" else after
    end = tokens.closing(opening) if tokens[opening].text in ("(", "{") else opening
    is_whole = tokens[end + 1].text in (";", ",") and end > opening + 1
    if is_whole and tokens[after].text == "(":
        tokens[after].text = f" = metal::msl_make<{vector}>("
    elif is_whole and tokens[opening].text == "{":
        tokens[opening].text = ("" if opening > after else "= ") + f"metal::msl_list<{vector}>("
        tokens[end].text = ")"
    elif end == opening:
        while tokens[end + 1].text not in (";", ",", ")", "}", ""):
            end = tokens.closing(end + 1) if tokens[end + 1].text in ("(", "[", "{") else end + 1
    return end + 1


def rewrite_braced_arguments(tokens: TokenList) -> None:
    """``f({a, b})``: the braces construct the vector or struct that the parameter asks for."""
    for i in tokens.indices():
        if tokens[i].text != "{" or tokens[i - 1].text not in ("(", ",") or not in_function(tokens[i].scope):
            continue
        opening = tokens.enclosing(i)
        end = tokens.closing(i)
        inner = [tokens[j].text for j in range(i + 1, end)]
        declares = tokens[opening - 1].kind == "name" and (
            tokens[opening - 2].text == ">"
            or (tokens[opening - 2].kind == "name" and tokens[opening - 2].text not in ("return", "else", "do"))
        )
        if tokens[opening].text == "(" and inner and not {";", "{"} & set(inner) and not declares:
            tokens[i].text = "metal::msl_braced("
            tokens[end].text = ")"
