import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "write_configuration_page.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="needs the repository")
def test_page_is_current() -> None:
    subprocess.run([sys.executable, str(SCRIPT), "--check"], check=True)
