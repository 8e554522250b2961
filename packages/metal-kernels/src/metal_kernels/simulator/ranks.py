"""A ``float`` times a vector of ``half``: Metal converts the scalar, clang's OpenCL mode refuses."""

import re
from collections.abc import Sequence
from dataclasses import replace

from .toolchain import toolchain
from .unit import Unit

COMPLAINT = "scalar operand type has greater rank"
# The operands' lines are those of clang's input, whatever its line markers say.
_PLACE = r"\{(\d+):(\d+)-(\d+):(\d+)\}"
_OPERANDS = re.compile(
    rf"^<stdin>:\d+:\d+:{_PLACE}{_PLACE}: error: {COMPLAINT}[^(]*\((.*) and .*\)$",
    re.MULTILINE,
)
_ROUNDS = 16  # one operation of a line at a time


def convert_scalars(unit: Unit, entries: str, flags: Sequence[str]) -> Unit:
    """The unit with such scalars converted to the type of the vector's lanes; lines stay where they are.

    Args:
        unit: What clang refused.
        entries: Generated entry points, which instantiate templates.
        flags: Of the refused compilation.
    """
    for _ in range(_ROUNDS):
        options = (
            "-fsyntax-only",
            "-fdiagnostics-print-source-range-info",
            "-fno-caret-diagnostics",
            "-ferror-limit=0",
        )
        done = toolchain().run(*flags, *options, "-", text=unit.text + entries)
        lines = unit.text.split("\n")
        edited: set[int] = set()
        for match in _OPERANDS.finditer(done.stderr):
            first, start, line, end, third, other_start, last, other_end = (int(n) - 1 for n in match.groups()[:8])
            if len({first, line, third, last}) > 1 or line in edited or line >= len(lines):
                continue
            lines[line] = _converted(lines[line], (start, end), (other_start, other_end), _is_vector(match.group(9)))
            edited.add(line)
        if not edited:
            break
        unit = replace(unit, text="\n".join(lines))
    return unit


def _is_vector(description: str) -> bool:
    return "vec<" in description or "ext_vector_type" in description


def _converted(text: str, left: tuple[int, int], right: tuple[int, int], left_is_vector: bool) -> str:
    vector, scalar = (left, right) if left_is_vector else (right, left)
    lane = f"metal::msl_as_lane<decltype({text[slice(*vector)]})>({text[slice(*scalar)]})"
    return text[: scalar[0]] + lane + text[scalar[1] :]
