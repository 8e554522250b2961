"""From Metal source to a unit that clang compiles: preprocess, then rewrite what only Metal has."""

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from . import declarations, expressions
from .choices import rewrite_choices, rewrite_comparisons
from .copies import declare_copies
from .errors import KernelCompileError
from .kernels import Program
from .methods import mark_methods
from .places import Place
from .scopes import mark_scopes
from .tokens import TokenList
from .toolchain import MSL_HEADERS, cache_directory, toolchain

LANGUAGE = ("-x", "clcpp", "-cl-std=clc++2021", "-cl-single-precision-constant", "-cl-no-stdinc", "-nostdinc")
FIRST_USER_DECLARATION = "MslUserBegin"
_END_OF_PREAMBLE = "#pragma msl_end_of_preamble"
METAL_HEADERS = [
    "metal_stdlib",
    "metal_math",
    "metal_integer",
    "metal_common",
    "metal_geometric",
    "metal_relational",
    "metal_compute",
    "metal_simdgroup",
    "metal_simdgroup_matrix",
    "metal_quadgroup",
    "metal_atomic",
    "metal_array",
    "metal_limits",
    "metal_pack",
    "metal_matrix",
    "metal_type_traits",
    "metal_types",
    "metal_numeric",
    "metal_uniform",
    "metal_logging",
    "simd/simd.h",
]


@dataclass(frozen=True)
class Source:
    """Metal source, and what it is compiled with.

    ``parts`` are named pieces, joined in order; diagnostics count lines within each. The ``preamble`` comes
    before them and declares no kernels, so that other sources share its translation, precompiled.
    """

    parts: tuple[tuple[str, str], ...]
    include_directories: tuple[str, ...] = ()
    defines: tuple[str, ...] = ()
    function_constants: tuple[tuple[str, str], ...] = ()
    preamble: str = ""

    @property
    def text(self) -> str:
        """The parts with markers that tell them apart."""
        marked = "\n".join(f'# 1 "{name}"\n{text}' for name, text in self.parts)
        return f'# 1 "preamble"\n{self.preamble}\n{_END_OF_PREAMBLE}\n{marked}\n'

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that decides what is compiled."""
        return self.text, self.include_directories, self.defines, self.function_constants


@dataclass(frozen=True)
class Unit:
    """A translated unit: clang reads the ``preamble``, precompiled, and then ``text``.

    The ``places`` are those of the lines of both, which are counted together.
    """

    preamble: str
    text: str
    places: tuple[Place, ...]
    program: Program

    def place(self, line: int) -> Place:
        """Where line ``line`` of the unit (from 1) was written."""
        return self.places[line - 1] if 0 < line <= len(self.places) else Place("<unit>", line)


@lru_cache(maxsize=8)
def translate(source: Source, metal_version: tuple[int, int]) -> Unit:
    """Preprocess and rewrite ``source``.

    Raises:
        KernelCompileError: It cannot be preprocessed, or its brackets do not match.
    """
    before, _, after = _preprocess(source, metal_version).partition(f"{_END_OF_PREAMBLE}\n")
    coherent = metal_version >= (3, 2)
    preamble = _translate_preamble(before.rstrip("\n") + "\n", coherent, source.function_constants, frozenset())
    piece = _translate_piece(after, coherent and "coherent" in after, source.function_constants, preamble.names)
    lines = preamble.text.count("\n")
    text = f'# {lines} "<stdin>"\nstruct {FIRST_USER_DECLARATION};\n{piece.text}'
    program = replace(piece.program, errors=preamble.program.errors + piece.program.errors)
    return Unit(f'# 1 "<stdin>"\n{preamble.text}', text, preamble.places[:lines] + piece.places, program)


@dataclass(frozen=True)
class _Piece:
    """Translated text, the place of each of its lines, and the type names it declares."""

    text: str
    places: tuple[Place, ...]
    program: Program
    names: frozenset[str]


_Constants = tuple[tuple[str, str], ...]


def _translated(text: str, coherent: bool, constants: _Constants, known: frozenset[str]) -> _Piece:
    """Rewrite preprocessed text: where ``coherent`` is a word of the language, it is dropped."""
    tokens = TokenList(text)
    program = Program()
    expressions.check_words(tokens, program)
    if coherent:
        expressions.drop_coherent(tokens)
    mark_scopes(tokens)
    mark_methods(tokens)
    declare_copies(tokens)
    declarations.collect_instantiations(tokens, program)
    tokens.compact()
    declarations.set_function_constants(tokens, program, dict(constants))
    tokens.compact()
    declarations.collect_kernels(tokens, program)
    declarations.remove_attributes(tokens, program)
    tokens.compact()
    expressions.refer_to_functions(tokens)
    expressions.drop_thread_words(tokens)
    expressions.qualify_constants(tokens)
    tokens.compact()
    declarations.place_threadgroup_variables(tokens, program)
    tokens.compact()
    expressions.name_bool_vectors(tokens)
    rewrite_choices(tokens)
    names = known | expressions.type_names(tokens)
    rewrite_comparisons(tokens, set(names) | {">"})
    expressions.rewrite_casts(tokens, program, set(names))
    tokens.compact()
    expressions.rewrite_constructors(tokens, set(names))
    tokens.compact()
    expressions.rewrite_braced_arguments(tokens)
    rendered, places = tokens.render()
    return _Piece(rendered, tuple(places), program, frozenset(names))


_translate_preamble = lru_cache(maxsize=4)(_translated)
_translate_piece = lru_cache(maxsize=4)(_translated)  # language versions mostly share it


def _preprocess(source: Source, metal_version: tuple[int, int]) -> str:
    major, minor = metal_version
    includes = [part for path in (str(_empty_headers()), *source.include_directories) for part in ("-I", path)]
    done = toolchain().run(
        *LANGUAGE,
        "-E",
        "-Wno-everything",
        *includes,
        f"-D__METAL_VERSION__={major}{minor}0",
        *(f"-D{define}" for define in source.defines),
        "-include",
        str(MSL_HEADERS / "predefined.h"),
        "-",
        text=source.text,
    )
    if done.returncode:
        raise KernelCompileError(done.stderr.strip())
    return re.sub(r"^\s*#\s*pragma (METAL|mark|once)\b[^\n]*$", "", done.stdout, flags=re.MULTILINE)


@cache
def _empty_headers() -> Path:
    """A folder with Metal's own headers, empty: their contents are always included."""
    folder = cache_directory() / "include"
    for name in METAL_HEADERS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder
