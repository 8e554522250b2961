"""Pre-pass, structs: copies out of constant memory, which clang makes only where a struct declares them."""

from .tokens import TokenList

_OTHER_SPACES = {"device", "threadgroup", "constant"}
_TYPES = {"struct", "class", "union"}


def declare_copies(tokens: TokenList) -> None:
    """Let every struct declare the copies that Metal knows, at the brace that opens its definition."""
    _drop_default_constructors(tokens)
    unnamed = 0
    for i in tokens.indices():
        if tokens[i].text not in _TYPES or tokens[i - 1].text == "enum":
            continue
        opening: int | None = i + 1
        if tokens[i - 1].text == "typedef" and tokens[i + 1].text == "{":
            unnamed += 1
            name = f"msl_unnamed_{unnamed}"
            tokens[i].text += f" {name}"
        else:
            name, opening = tokens[i + 1].text, _definition(tokens, i + 1)
        if opening is not None:
            declared = _declarations(tokens, name, opening)
            is_class = tokens[i].text.startswith("class")
            tokens[opening].text = "{" + (f" public:{declared} private:" if is_class else declared)


def _drop_default_constructors(tokens: TokenList) -> None:
    """Drop ``S() threadgroup = default;`` and the like: one for all address spaces is enough."""
    for i in tokens.indices():
        if tokens[i].text == "default" and tokens[i - 1].text == "=" and tokens[i - 2].text in _OTHER_SPACES:
            start = i - 2
            while tokens[start - 1].text not in (";", "{", "}"):
                start -= 1
            if [tokens[i - 4].text, tokens[i - 3].text] == ["(", ")"]:
                tokens.drop(start, i + 2)
    tokens.compact()


def _definition(tokens: TokenList, name: int) -> int | None:
    """The brace that opens the definition of the struct whose name is at ``name``; None if this defines none."""
    i = name + 1
    if tokens[name].kind != "name":
        return None
    if tokens[i].text == "<":
        end = tokens.closing_angle(i)
        if end is None:
            return None
        i = end + 1
    if tokens[i].text == "final":
        i += 1
    if tokens[i].text == ":":
        while tokens[i].text not in ("{", ";", ")", ""):
            i += 1
    return i if tokens[i].text == "{" else None


def _parameters(tokens: TokenList, name: int) -> int:
    """Where the parameters of a constructor would begin: ``S(..)`` or ``S<T>(..)``."""
    end = tokens.closing_angle(name + 1) if tokens[name + 1].text == "<" else name
    return (name if end is None else end) + 1


def _declarations(tokens: TokenList, name: str, opening: int) -> str:
    """What the struct does not declare itself."""
    constructs = copies = assigns = False
    i, closing = opening + 1, tokens.closing(opening)
    while i < closing:
        text = tokens[i].text
        if text in ("{", "(", "["):
            i = tokens.closing(i)
        elif text == "operator" and tokens[i + 1].text == "=":
            assigns = True
        elif text == name and tokens[parameters := _parameters(tokens, i)].text == "(" and tokens[i - 1].text != "~":
            constructs = True
            first = [t.text for t in tokens[parameters + 1 : tokens.closing(parameters)]]
            copies |= name in first and "&" in first
        i += 1
    parts = ["CONSTRUCTOR"] * (not constructs) + ["COPIES"] * (not copies) + ["ASSIGNMENTS"] * (not assigns)
    return "".join(f" MSL_{part}({name})" for part in parts)
