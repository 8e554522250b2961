"""The clang that compiles kernels: where it is found and how it is called."""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import ToolchainError

MINIMUM_CLANG = 19
_NEWEST_CLANG = 30
_INSTALL = "Run `pip install 'metal-kernels[simulator]'`, or `apt-get install clang-19 lld-19`."
_HERE = Path(__file__).parent
MSL_HEADERS = _HERE / "msl"
RUNTIME_SOURCES = _HERE / "runtime"


@dataclass(frozen=True)
class Toolchain:
    """Commands that run clang and an ELF linker; ``version`` is clang's own."""

    clang: tuple[str, ...]
    linker: tuple[str, ...]
    version: str

    @property
    def key(self) -> str:
        """What distinguishes the code it makes, with everything this package adds to a unit and where that lies.

        Two builds of one clang version do not read each other's precompiled headers, nor do headers move.
        """
        return f"{self.version}-{self.clang}-{_HERE}-{_sources_digest()}"

    def run(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run clang with ``text`` as its standard input."""
        return subprocess.run([*self.clang, *arguments], input=text, capture_output=True, text=True, check=False)

    def link(self, output: Path, *inputs: Path | str) -> None:
        """Link a shared library.

        Raises:
            ToolchainError: The linker refused.
        """
        command = [*self.linker, "-shared", "-o", str(output), *map(str, inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolchainError(f"[simulator] expected the linker to make {output.name}, got: {done.stderr.strip()}.")


@cache
def toolchain() -> Toolchain:
    """The first usable clang: ``METAL_KERNELS_CLANG``, the ziglang package's, or one on the path.

    Raises:
        ToolchainError: There is none, it is too old, or this is not Linux on x86-64.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ToolchainError(
            f"[simulator] expected Linux on x86-64, got {sys.platform} on {platform.machine()}. "
            "Run the kernels on the GPU instead."
        )
    chosen = os.environ.get("METAL_KERNELS_CLANG")
    if chosen:
        return _checked((chosen,), _linker_beside(chosen))
    zig = _zig()
    if zig:
        return _checked((zig, "clang"), (zig, "ld.lld"))
    oldest = ""
    for name in [*(f"clang++-{v}" for v in range(_NEWEST_CLANG, MINIMUM_CLANG - 1, -1)), "clang++"]:
        path = shutil.which(name)
        if path and _major(_version((path,))) >= MINIMUM_CLANG:
            return _checked((path,), _linker_beside(path))
        oldest = oldest or path or ""
    found = f"clang {_major(_version((oldest,)))}" if oldest else "none"
    raise ToolchainError(f"[simulator] expected clang {MINIMUM_CLANG} or newer, got {found}. {_INSTALL}")


def _zig() -> str | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "zig"
    return str(path) if path.exists() else None


def _linker_beside(clang: str) -> tuple[str, ...]:
    folder = Path(clang).resolve().parent
    version = re.search(r"(\d+)$", Path(clang).name)
    candidates = [folder / "ld.lld", shutil.which(f"ld.lld-{version.group(1)}") if version else None]
    candidates += [shutil.which("ld.lld"), shutil.which("ld")]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return (str(candidate),)
    raise ToolchainError(f"[simulator] expected a linker for {clang}, got none. {_INSTALL}")


def _checked(clang: tuple[str, ...], linker: tuple[str, ...]) -> Toolchain:
    version = _version(clang)
    if _major(version) < MINIMUM_CLANG:
        found = f"clang {version}" if version else f"no version from `{' '.join(clang)}`"
        raise ToolchainError(f"[simulator] expected clang {MINIMUM_CLANG} or newer, got {found}. {_INSTALL}")
    return Toolchain(clang, linker, version)


def _version(clang: tuple[str, ...]) -> str:
    try:
        text = subprocess.run([*clang, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
    match = re.search(r"clang version (\d+[\w.]*)", text)
    return match.group(1) if match else ""


def _major(version: str) -> int:
    match = re.match(r"\d+", version)
    return int(match.group()) if match else 0


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted([*MSL_HEADERS.glob("*"), *RUNTIME_SOURCES.glob("*"), *_HERE.glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def cache_directory() -> Path:
    """Where compiled kernels are kept: ``METAL_KERNELS_SIMULATOR_CACHE``, or a folder of the user's cache."""
    base = os.environ.get("METAL_KERNELS_SIMULATOR_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(base) if base else root / "metal-kernels" / "simulator"
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: object) -> str:
    """A short name for a combination of values."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]
