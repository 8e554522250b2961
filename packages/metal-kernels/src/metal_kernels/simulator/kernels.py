"""The kernels of a unit: their parameters, attributes and explicit instantiations."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from .places import Place
from .tokens import TokenList

_SPACES = {"device", "threadgroup", "constant", "thread"}
_VECTOR_TYPES = {"uint", "uint2", "uint3", "ushort", "ushort2", "ushort3", "uint32_t", "uint16_t"}
_SCALAR_TYPES = {"uint", "ushort", "uint32_t", "uint16_t"}
_VECTOR_ATTRIBUTES = [
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "dispatch_threads_per_threadgroup",
    "grid_size",
    "grid_origin",
]
_SCALAR_ATTRIBUTES = [
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_execution_width",
    "quadgroup_index_in_threadgroup",
    "quadgroups_per_threadgroup",
    "thread_index_in_quadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "dispatch_quadgroups_per_threadgroup",
]
THREAD_ATTRIBUTES = {
    **dict.fromkeys(_VECTOR_ATTRIBUTES, _VECTOR_TYPES),
    **dict.fromkeys(_SCALAR_ATTRIBUTES, _SCALAR_TYPES),
}
MAX_BUFFERS = 31
_ENTRY_PARAMETERS = "constant ulong* buffers, constant ulong* threadgroup_buffers, const device MslContext* context"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: ``kind`` is ``buffer``, ``threadgroup`` or ``thread`` (a thread attribute)."""

    name: str
    kind: str
    index: int = 0
    pointer: bool = False
    attribute: str = ""

    @property
    def argument(self) -> str:
        """How the generated entry point passes it."""
        if self.kind == "thread":
            return f"context->{self.attribute}"
        source = "buffers" if self.kind == "buffer" else "threadgroup_buffers"
        return f"Msl{'Pointer' if self.pointer else 'Reference'}{{{source}[{self.index}]}}"


@dataclass
class Kernel:
    """A kernel function, possibly a template."""

    name: str
    parameters: list[Parameter]
    is_template: bool
    max_threads: int = 1024

    def as_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Kernel":
        """What `as_json` wrote."""
        return cls(**{**value, "parameters": [Parameter(**p) for p in value["parameters"]]})


@dataclass
class Instantiation:
    """``template [[host_name("x")]] [[kernel]] decltype(f<..>) f<..>;``."""

    host_name: str
    function: str
    arguments: str
    place: Place


@dataclass
class Program:
    """What a unit declares; ``errors`` are the violations of Metal's rules that clang does not know."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    instantiations: list[Instantiation] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def error(self, place: Place, message: str) -> None:
        """Record a diagnostic in clang's form."""
        self.errors.append(f"{place}: error: {message}")

    def entries(self, only: str | None = None) -> tuple[str, dict[str, str]]:
        """The generated entry points, and the symbol of each kernel by host name."""
        wanted = [i for i in self.all_instantiations() if only in (None, i.host_name)]
        lines, symbols = [], {}
        for number, instantiation in enumerate(wanted):
            kernel = self.kernels.get(instantiation.function.split("::")[-1].strip())
            if kernel is None:
                self.error(instantiation.place, f"no kernel is named '{instantiation.function}'")
                continue
            symbol = f"msl_entry_{number}"
            symbols[instantiation.host_name] = symbol
            arguments = ", ".join(p.argument for p in kernel.parameters)
            call = f"{instantiation.function}{instantiation.arguments}({arguments})"
            lines.append(f'extern "C" void {symbol}({_ENTRY_PARAMETERS}) {{ {call}; }}')
        return "\n".join(lines) + "\n", symbols

    def all_instantiations(self) -> list[Instantiation]:
        """The explicit instantiations, and the kernels that need none."""
        named = {i.function.split("::")[-1] for i in self.instantiations}
        plain = [k for k in self.kernels.values() if k.name not in named and not k.is_template]
        return self.instantiations + [Instantiation(k.name, k.name, "", Place("<entry>", 0)) for k in plain]


def attribute_names(text: str) -> list[str]:
    """The comma-separated attributes inside ``[[...]]``."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def read_parameters(tokens: TokenList, opening: int, program: Program) -> list[Parameter]:
    """The parameters of the kernel whose ``(`` is at ``opening``; what is wrong with them goes to ``program``."""
    closing = tokens.closing(opening)
    parameters: list[Parameter] = []
    next_buffer = 0
    used: set[int] = set()
    start = opening + 1
    for i in range(opening + 1, closing + 1):
        if not _ends_parameter(tokens, i, opening, closing):
            continue
        if i > start:
            parameter = _read_parameter(tokens, start, i, next_buffer, program)
            parameters.append(parameter)
            if parameter.kind == "buffer":
                next_buffer = parameter.index + 1
                _check_buffer(tokens, start, i, parameter, used, program)
        start = i + 1
    return parameters


def _ends_parameter(tokens: TokenList, i: int, opening: int, closing: int) -> bool:
    if i == closing:
        return True
    if tokens[i].text != "," or tokens.enclosing(i) != opening:
        return False
    depth = 0
    for j in range(opening + 1, i):
        text = tokens[j].text
        depth += (text in ("<", "[[")) - (text in (">", "]]"))
    return depth == 0


def _check_buffer(
    tokens: TokenList, start: int, stop: int, parameter: Parameter, used: set[int], program: Program
) -> None:
    place = tokens[start].place
    optional = "function_constant" in tokens.names(start, stop)
    if parameter.index in used and not optional:
        program.error(place, f"buffer index {parameter.index} is used twice")
    if parameter.index >= MAX_BUFFERS:
        program.error(place, f"buffer index {parameter.index}: a kernel has at most {MAX_BUFFERS} buffers")
    used.add(parameter.index)


def _read_parameter(tokens: TokenList, start: int, stop: int, next_buffer: int, program: Program) -> Parameter:
    declaration, attributes = _split_attributes(tokens, start, stop)
    name = _declared_name(declaration)
    place = tokens[start].place
    if "*" in declaration or "&" in declaration or "[" in declaration:
        return _read_pointer(name, declaration, attributes, next_buffer, place, program)
    known = [a for a in attributes if a in THREAD_ATTRIBUTES]
    if not known:
        program.error(place, f"kernel parameter '{name}' has no attribute that says what to pass")
        return Parameter(name, "thread", attribute="thread_index_in_threadgroup")
    written_type = " ".join(t for t in declaration[:-1] if t != "const")
    if written_type not in THREAD_ATTRIBUTES[known[0]]:
        program.error(place, f"type '{written_type}' is not valid for attribute '{known[0]}'")
    return Parameter(name, "thread", attribute=known[0])


def _split_attributes(tokens: TokenList, start: int, stop: int) -> tuple[list[str], list[str]]:
    declaration: list[str] = []
    attributes: list[str] = []
    i = start
    while i < stop:
        if tokens[i].text == "[[":
            end = tokens.closing(i)
            attributes += attribute_names(tokens.text(i + 1, end))
            i = end
        else:
            declaration.append(tokens[i].text)
        i += 1
    return [t for t in declaration if t], attributes


def _declared_name(declaration: list[str]) -> str:
    head = declaration[: declaration.index("[")] if "[" in declaration else declaration
    names = [t for t in head if re.fullmatch(r"[A-Za-z_]\w*", t)]
    return names[-1] if names else "?"


def _read_pointer(
    name: str, declaration: list[str], attributes: list[str], next_buffer: int, place: Place, program: Program
) -> Parameter:
    space = _SPACES & set(declaration)
    pointer = "&" not in declaration
    if not space:
        program.error(place, f"kernel parameter '{name}': a pointer or reference needs an address space")
    if "thread" in space:
        program.error(place, f"kernel parameter '{name}' cannot be in the thread address space")
    joined = ", ".join(attributes)
    if "threadgroup" in space:
        slot = re.search(r"\bthreadgroup\s*\(\s*(\d+)\s*\)", joined)
        if not slot:
            program.error(place, f"kernel parameter '{name}' needs [[threadgroup(n)]]")
        return Parameter(name, "threadgroup", int(slot.group(1)) if slot else 0, pointer)
    buffer = re.search(r"\bbuffer\s*\(\s*(\d+)\s*\)", joined)
    return Parameter(name, "buffer", int(buffer.group(1)) if buffer else next_buffer, pointer)
