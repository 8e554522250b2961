"""The README's first command."""

import re
import subprocess
import sys
from pathlib import Path

from live_server import environment

CLI = str(Path(sys.executable).with_name("vllm-metal"))


def test_demo_answers_and_prints_its_table(tmp_path: Path) -> None:
    command = [CLI, "demo", "--prompt", "What is the capital of France?", "--max-tokens", "60"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Paris" in result.stdout
    for name in ("time to first token", "tokens/s", "KV", "concurrency"):
        assert re.search(name, result.stdout, re.IGNORECASE), result.stdout


def test_doctor_finds_the_plugin_chosen() -> None:
    result = subprocess.run([CLI, "doctor"], env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MetalPlatform" in result.stdout
