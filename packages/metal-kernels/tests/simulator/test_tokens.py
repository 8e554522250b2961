"""Tokens can be edited without their lines getting lost."""

import pytest

from metal_kernels.simulator import KernelCompileError, Place
from metal_kernels.simulator.tokens import TokenList

TEXT = '# 7 "a.h"\nint x;\n# 3 "b.metal"\n  float4 v = f(a[[b]] >>= 1.0e-5h,\n    c<d>(e));\n'


def test_text_survives():
    text, _ = TokenList(TEXT).render()
    assert "".join(text.split()) == "intx;float4v=f(a[[b]]>>=1.0e-5h,c<d>(e));"


def test_every_line_has_its_place():
    text, places = TokenList(TEXT).render()
    lines = text.split("\n")
    at = {line.strip(): places[number] for number, line in enumerate(lines) if line.strip()}
    assert at["int x;"] == Place("a.h", 7)
    assert at["c<d>(e));"] == Place("b.metal", 4)


def test_dropped_tokens_keep_the_lines():
    tokens = TokenList("a\nb\nc\n")
    tokens.drop(1, 2)
    tokens.compact()
    text, places = tokens.render()
    assert text.split("\n")[2] == "c"
    assert places[2].line == 3


def test_brackets():
    tokens = TokenList("f(a, (b)[c])")
    assert tokens.closing(1) == 10
    assert tokens.opening(10) == 1
    assert tokens.enclosing(8) == 7
    with pytest.raises(KernelCompileError, match="never closed"):
        TokenList("f((a)").closing(1)


def test_angles():
    assert TokenList("vec<T, 4> x;").closing_angle(1) == 5
    assert TokenList("a < b && c;").closing_angle(1) is None
