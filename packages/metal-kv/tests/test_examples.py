import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_paged_generation_gives_mlx_lms_tokens():
    pytest.importorskip("mlx_lm", reason="the example, not the package, needs mlx-lm")
    program = EXAMPLES / "paged_generation.py"
    lines = subprocess.run([sys.executable, program], check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[1] == "prompt of 17 tokens, 12 of them in the cache"
    assert lines[-1].endswith("equal to mlx-lm's: True")
