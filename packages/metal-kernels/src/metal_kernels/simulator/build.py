"""From a translated unit to a shared library, kept on disk."""

import ctypes
import json
import os
import tempfile
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from pathlib import Path

from .errors import KernelCompileError
from .kernels import Kernel
from .lines import LineTable
from .places import Place
from .ranks import COMPLAINT, convert_scalars
from .report import RawReport
from .toolchain import MSL_HEADERS, RUNTIME_SOURCES, cache_directory, digest, toolchain
from .unit import LANGUAGE, Source, translate

_TARGET = ("-target", "x86_64-unknown-linux-gnu", "-march=x86-64-v3", "-fPIC")
_KERNEL = (
    *_TARGET,
    "-c",
    "-w",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-float-cast-overflow",  # numbers that an integer cannot hold become its nearest
    "-fstack-clash-protection",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
)
_RUNTIME = (
    *["-x", "c++", "-std=c++17", "-O2", "-c", "-ffreestanding", "-nostdinc", "-fno-exceptions", "-fno-rtti"],
    *_TARGET,
)


class Mode(Enum):
    """How a kernel is compiled: the two differ in what private variables hold before they are written."""

    CHECKED = (
        "-O1",
        "-gline-tables-only",
        "-gdwarf-4",
        "-ftrivial-auto-var-init=pattern",
        "-fno-finite-loops",
        "-fsanitize=thread,array-bounds,integer-divide-by-zero",
        "-fsanitize-coverage=trace-pc",
        "-mllvm",
        "-sanitizer-coverage-prune-blocks=0",  # a loop without an exit counts its turns too
        "-mllvm",
        "-tsan-instrument-func-entry-exit=0",
        "-mllvm",
        "-tsan-instrument-atomics=0",
        "-mllvm",
        "-tsan-instrument-read-before-write=1",
    )
    FAST = ("-O2", "-ftrivial-auto-var-init=zero")


@dataclass(frozen=True)
class Library:
    """A compiled kernel: loaded on first use."""

    path: Path
    symbol: str
    kernel: Kernel
    places: tuple[Place, ...]

    @cached_property
    def _loaded(self) -> ctypes.CDLL:
        runtime()
        return ctypes.CDLL(str(self.path))

    @property
    def entry(self) -> int:
        """Address of the entry point."""
        return ctypes.cast(getattr(self._loaded, self.symbol), ctypes.c_void_p).value or 0

    @cached_property
    def address_range(self) -> tuple[int, int]:
        """Where the library is mapped."""
        assert self._loaded
        low, high = 0, 0
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(str(self.path)):
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                low, high = low or begin, max(high, end)
        return low, high

    @cached_property
    def _lines(self) -> LineTable:
        return LineTable(self.path)

    def place(self, line: int, pc: int) -> Place | None:
        """The place of a line of the unit, or of an instruction."""
        line = line or (self._lines.line(pc - self.address_range[0]) if pc else 0)
        place = self.places[line - 1] if 0 < line <= len(self.places) else None
        return place if place and place.line else None


def build(source: Source, kernel: str, mode: Mode, metal_version: tuple[int, int]) -> Library:
    """Compile the kernel with host name ``kernel``, or load what an earlier run compiled.

    Raises:
        KernelCompileError: It does not compile, or is not in the source.
    """
    name = digest(toolchain().key, source.key, kernel, mode.value, metal_version)
    library, description = cache_directory() / f"{name}.so", cache_directory() / f"{name}.json"
    if not description.exists():
        _compile(source, kernel, mode, metal_version, library, description)
    return _read_description(library, description)


def _compile(
    source: Source, kernel: str, mode: Mode, metal_version: tuple[int, int], library: Path, description: Path
) -> None:
    unit = translate(source, metal_version)
    entries, symbols = unit.program.entries(kernel)
    if kernel not in symbols:
        raise KernelCompileError(
            "\n".join(unit.program.errors) or f"[simulator] expected a kernel '{kernel}', got none."
        )
    with tempfile.TemporaryDirectory(dir=cache_directory()) as folder:
        compiled, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        version = f"-D__METAL_VERSION__={metal_version[0]}{metal_version[1]}0"
        flags = (*LANGUAGE, *_KERNEL, *mode.value, version)
        include = ("-include-pch", str(precompiled(flags, unit.preamble)))
        done = toolchain().run(*flags, *include, "-o", str(compiled), "-", text=unit.text + entries)
        if COMPLAINT in done.stderr:
            unit = convert_scalars(unit, entries, (*LANGUAGE, *_KERNEL, *mode.value, version, *include))
            done = toolchain().run(*flags, *include, "-o", str(compiled), "-", text=unit.text + entries)
        if done.returncode:
            raise KernelCompileError(f"[simulator] the kernel does not compile:\n{done.stderr.strip()}")
        toolchain().link(linked, compiled, runtime_path())
        os.replace(linked, library)
    lengths: list[tuple[str, int, int]] = []  # runs of consecutive lines
    for place in unit.places:
        if lengths and lengths[-1][0] == place.file and lengths[-1][1] + lengths[-1][2] == place.line:
            lengths[-1] = (place.file, lengths[-1][1], lengths[-1][2] + 1)
        else:
            lengths.append((place.file, place.line, 1))
    function = next(i.function for i in unit.program.all_instantiations() if i.host_name == kernel)
    used = unit.program.kernels[function.split("::")[-1]]
    text = json.dumps({"symbol": symbols[kernel], "kernel": used.as_json(), "places": lengths})
    write_whole(description, text)


def _read_description(library: Path, description: Path) -> Library:
    content = json.loads(description.read_text())
    places = [Place(file, first + k) for file, first, count in content["places"] for k in range(count)]
    return Library(library, content["symbol"], Kernel.from_json(content["kernel"]), tuple(places))


def write_whole(path: Path, text: str) -> None:
    """Make ``text`` the content of a file; other processes see all of it or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


@cache
def precompiled(flags: tuple[str, ...], preamble: str) -> Path:
    """The Metal headers and a unit's preamble, precompiled for these flags."""
    path = cache_directory() / f"{digest(toolchain().key, flags, preamble)}.pch"
    if not path.exists():
        header = path.with_suffix(".h")  # clang wants to see it later
        write_whole(header, f'#include "{MSL_HEADERS / "entry.h"}"\n{preamble}')
        with tempfile.TemporaryDirectory(dir=cache_directory()) as folder:
            output = Path(folder) / "entry.pch"
            arguments = [flag for flag in flags if flag not in ("-c", "-fsyntax-only", "-ast-dump")]
            done = toolchain().run(
                *arguments,
                "-c",
                "-Xclang",
                "-emit-pch",
                "-Xclang",
                "-fno-pch-timestamp",
                "-fpch-instantiate-templates",
                str(header),
                "-o",
                str(output),
            )
            if done.returncode:
                raise KernelCompileError(f"[simulator] the Metal headers do not compile:\n{done.stderr.strip()}")
            os.replace(output, path)
    return path


@cache
def runtime_path() -> Path:
    """The executor, compiled."""
    path = cache_directory() / f"{digest(toolchain().key, _RUNTIME)}-runtime.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as folder:
            compiled, linked = Path(folder) / "runtime.o", Path(folder) / "runtime.so"
            done = toolchain().run(*_RUNTIME, str(RUNTIME_SOURCES / "runtime.cpp"), "-o", str(compiled))
            if done.returncode:
                raise KernelCompileError(f"[simulator] the executor does not compile:\n{done.stderr.strip()}")
            toolchain().link(linked, compiled)
            os.replace(linked, path)
    return path


@cache
def runtime() -> ctypes.CDLL:
    """The executor, loaded with the C library's mathematics."""
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(runtime_path()))
    library.msl_map.restype = ctypes.c_uint64
    library.msl_map.argtypes = (ctypes.c_uint64, ctypes.c_uint64)
    library.msl_unmap.restype = None
    library.msl_unmap.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
    library.msl_launch.restype = None
    library.msl_launch.argtypes = (ctypes.c_void_p, ctypes.POINTER(RawReport))
    return library
