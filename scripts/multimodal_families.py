"""Write the families of docs/multimodal.md that mlx-vlm has and that are not served with images or sound.

python scripts/multimodal_families.py [--check]

With --check nothing is written, and the exit status says whether the page is up to date.
"""

import importlib.util
import re
import sys
from pathlib import Path

from metal_models.multimodal.refused import REFUSED

PAGE = Path(__file__).parents[1] / "docs" / "multimodal.md"
BEGIN, END = "<!-- written by scripts/multimodal_families.py -->", "<!-- end -->"


def table() -> str:
    """Return a row for every reason: who is refused for it, and whose language model can be served alone."""
    rows = ["| reason | family |", "|---|---|"]
    for reason in dict.fromkeys(REFUSED.values()):
        kinds = [kind for kind, why in REFUSED.items() if why == reason]
        names = [f"`{kind}`" + ("*" if importlib.util.find_spec(f"mlx_lm.models.{kind}") else "") for kind in kinds]
        rows.append(f"| {reason} | {', '.join(names)} |")
    return "\n".join(rows)


def main() -> int:
    """Write the page, or compare it."""
    old = PAGE.read_text()
    new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", old, flags=re.DOTALL)
    if "--check" in sys.argv:
        return int(old != new)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
