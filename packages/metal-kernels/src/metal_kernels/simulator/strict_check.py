"""The strict check: would Metal's compiler accept this source?"""

import re
from collections.abc import Sequence

from .build import precompiled
from .errors import KernelCompileError
from .pointers import pointers_without_space
from .toolchain import cache_directory, digest, toolchain
from .unit import LANGUAGE, Source, Unit, translate

METAL_VERSIONS = ((3, 1), (3, 2))
_FIRST_USER_DECLARATION = "MslUserBegin"
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
    "-Wimplicit-float-conversion",
    "-ferror-limit=20",
    "-ftemplate-backtrace-limit=4",
    "-fno-caret-diagnostics",
    "-fno-color-diagnostics",
    "-Xclang",
    "-ast-dump",
)
_DIAGNOSTIC = re.compile(r"^(?:<stdin>|.*?):(\d+):\d+: (error|warning|note): (.*)$")


def check(source: Source, metal_versions: Sequence[tuple[int, int]] = METAL_VERSIONS) -> None:
    """Type-check ``source`` with real address spaces at each language version.

    A verdict is kept on disk, so that checking the same source again costs a look-up.

    Raises:
        KernelCompileError: Metal's rules are broken; the message names each line.
    """
    for version in metal_versions:
        verdict = cache_directory() / f"{digest(toolchain().key, source.key, version, 'check')}.txt"
        if not verdict.exists():
            verdict.write_text("\n".join(_diagnose(source, version)))
        errors = verdict.read_text()
        if errors:
            raise KernelCompileError(
                f"[simulator] the kernel is not valid Metal {version[0]}.{version[1]}:\n{errors}"
            )


def _diagnose(source: Source, metal_version: tuple[int, int]) -> list[str]:
    try:
        unit = translate(source, metal_version)
    except KernelCompileError as error:
        return [str(error)]
    entries, _ = unit.program.entries()
    if unit.program.errors:
        return unit.program.errors
    flags = (*LANGUAGE, *_EXTENSIONS, f"-D__METAL_VERSION__={metal_version[0]}{metal_version[1]}0")
    done = toolchain().run(
        *flags,
        *_STRICT,
        "-include-pch",
        str(precompiled(flags)),
        "-",
        text=f"struct {_FIRST_USER_DECLARATION}; {unit.text}{entries}",
    )
    errors = _errors(done.stderr, unit)
    if done.returncode and not errors:
        errors = [done.stderr.strip()]
    if not errors:
        ast = done.stdout[done.stdout.find(_FIRST_USER_DECLARATION) :]
        errors = [
            f"{unit.place(line)}: error: '{name}' of type '{declared}' needs an address space"
            for line, name, declared in pointers_without_space(ast)
        ]
    return errors


def _errors(text: str, unit: Unit) -> list[str]:
    lines: list[str] = []
    keep = False
    for line in text.splitlines():
        match = _DIAGNOSTIC.match(line)
        if not match:
            continue
        severity, message = match.group(2), match.group(3)
        # Metal converts no other floating-point type to bfloat implicitly.
        target = message.split(" to ")[-1]
        bfloat = severity == "warning" and ("bfloat" in target or "__bf16" in target)
        if severity != "note":
            keep = severity == "error" or bfloat
        if keep:
            place = unit.place(int(match.group(1))) if line.startswith("<stdin>") else "metal"
            lines.append(f"{place}: {'error' if bfloat else severity}: {message}")
    return lines
