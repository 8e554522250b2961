import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs_as_printed():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(program, names)
    assert names["out"].shape == (40, 8, 64)
    assert names["sequence"].num_tokens == 40
