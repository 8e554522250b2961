"""The strict check: would Metal's compiler accept this source?"""

import re
from collections.abc import Sequence

from .build import precompiled, write_whole
from .errors import KernelCompileError, ToolchainError
from .ranks import COMPLAINT, convert_scalars
from .syntax_rules import LAMBDA, violations
from .toolchain import cache_directory, digest, toolchain
from .unit import FIRST_USER_DECLARATION, LANGUAGE, Source, Unit, translate

METAL_VERSIONS = ((3, 1), (3, 2))
_IN_HEADERS = "metal"
_EXTENSIONS = (
    "-Xclang",
    "-cl-ext=-__opencl_c_program_scope_global_variables,-__opencl_c_device_enqueue,-cl_khr_fp64,-__opencl_c_fp64",
)
_STRICT = (
    "-fsyntax-only",
    "-Wno-everything",
    "-Werror=vla",
    "-Werror=uninitialized",
    "-Werror=sometimes-uninitialized",
    "-Werror=return-type",
    "-Werror=c++11-narrowing",
    "-Wimplicit-float-conversion",
    "-ferror-limit=20",
    "-ftemplate-backtrace-limit=0",
    "-fno-caret-diagnostics",
    "-fno-color-diagnostics",
    "-Xclang",
    "-ast-dump",
)
_DIAGNOSTIC = re.compile(r"^(?:<stdin>|.*?):(\d+):\d+: (error|warning|note): (.*)$")
# What the headers declare for some versions only.
_SINCE_3_2 = re.compile(r"memory_order_(?!relaxed)|thread_scope|atomic_thread_fence|os_log|logger")
_OTHER_SPACE = re.compile(
    r"cannot initialize object parameter of type '(?:const )?__private (.*)' "
    r"with an expression of type '.*__(global|local) .*'"
)
_SPACES = {"global": "device", "local": "threadgroup"}
_PLACE = re.compile(r"(.*?):(\d+): error: ")


def check(source: Source, metal_versions: Sequence[tuple[int, int]] = METAL_VERSIONS) -> None:
    """Type-check ``source`` with real address spaces at each language version.

    A verdict is kept on disk, so that checking the same source again costs a look-up.

    Raises:
        KernelCompileError: Metal's rules are broken; the message names each line.
    """
    __tracebackhide__ = True
    accepted: set[str] = set()  # texts that mean the same in all versions
    for version in metal_versions:
        verdict = cache_directory() / f"{digest(toolchain().key, source.key, version, 'check')}.txt"
        if not verdict.exists():
            write_whole(verdict, "\n".join(_quoted(_diagnose(source, version, accepted), source)))
        errors = verdict.read_text()
        if errors:
            raise KernelCompileError(f"[simulator] the kernel is not valid Metal {version[0]}.{version[1]}:\n{errors}")


def _diagnose(source: Source, metal_version: tuple[int, int], accepted: set[str]) -> list[str]:
    try:
        unit = translate(source, metal_version)
    except KernelCompileError as error:
        return [str(error)]
    entries, _ = unit.program.entries()
    if unit.program.errors:
        return unit.program.errors
    written = unit.text.partition("\n")[2]  # after the line's number, which depends on the preamble
    if written in accepted:
        return []
    flags = (*LANGUAGE, *_EXTENSIONS, f"-D__METAL_VERSION__={metal_version[0]}{metal_version[1]}0")
    include = ("-include-pch", str(precompiled(flags, unit.preamble)))
    done = toolchain().run(*flags, *_STRICT, *include, "-", text=unit.text + entries)
    if COMPLAINT in done.stderr:
        unit = convert_scalars(unit, entries, (*flags, *include))
        done = toolchain().run(*flags, *_STRICT, *include, "-", text=unit.text + entries)
    errors = _errors(done.stderr, unit)
    if done.returncode and not errors:
        raise ToolchainError(f"[simulator] expected a verdict of clang's, got: {done.stderr.strip()}.")
    if not errors:
        ast = done.stdout[done.stdout.find(FIRST_USER_DECLARATION) :]
        errors = [f"{unit.place(line)}: error: {complaint}" for line, complaint in violations(ast, metal_version)]
    if not errors and not _SINCE_3_2.search(written) and LAMBDA not in done.stdout:
        accepted.add(written)
    return errors


def _quoted(errors: list[str], source: Source) -> list[str]:
    """The errors, each followed by the line that it names."""
    texts = {name: text.splitlines() for name, text in source.parts}
    lines: list[str] = []
    for error in errors:
        lines.append(error)
        place = _PLACE.match(error)
        written = texts.get(place.group(1), []) if place else []
        if place and 0 < int(place.group(2)) <= len(written):
            lines.append(f"    {written[int(place.group(2)) - 1].strip()}")
    return lines


def _errors(text: str, unit: Unit) -> list[str]:
    lines: list[str] = []
    keep = False
    for line in text.splitlines():
        match = _DIAGNOSTIC.match(line)
        if not match:
            continue
        severity, message = match.group(2), match.group(3)
        implicit = _is_implicit_bfloat(severity, message)
        if severity != "note":
            keep = severity == "error" or implicit
        if not keep:
            continue
        place = str(unit.place(int(match.group(1)))) if line.startswith("<stdin>") else ""
        if severity == "note":
            _blame(lines, place)
        if place or severity != "note":
            lines.append(f"{place or _IN_HEADERS}: {'error' if implicit else severity}: {_in_words_of_metal(message)}")
    return lines


def _in_words_of_metal(message: str) -> str:
    other = _OTHER_SPACE.search(message)
    if not other:
        return message
    space = _SPACES[other.group(2)]
    return f"the method of '{other.group(1)}' is not marked '{space}', but its object is in that address space"


def _is_implicit_bfloat(severity: str, message: str) -> bool:
    """Metal converts no other floating-point type to bfloat implicitly; clang only warns."""
    target = message.rsplit(" to ", maxsplit=1)[-1]
    named = severity == "warning" and message.endswith("[-Wimplicit-float-conversion]")
    return named and ("bfloat" in target or "__bf16" in target)


def _blame(lines: list[str], place: str) -> None:
    """An error inside Metal's own headers is the fault of the first line of the kernel that leads there."""
    last = max((k for k, text in enumerate(lines) if ": error: " in text), default=-1)
    if place and last >= 0 and lines[last].startswith(f"{_IN_HEADERS}: "):
        lines[last] = place + lines[last].removeprefix(_IN_HEADERS)
