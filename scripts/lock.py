"""Write requirements.lock and requirements-dev.lock, or check that they are current.

Both are universal (macOS arm64 and Linux, Python 3.11 to 3.14), hashed, and name no index, so they work
behind any mirror. Pins that still satisfy every pyproject.toml are kept; ``--upgrade`` takes the newest.

    python scripts/lock.py            # write
    python scripts/lock.py --check    # exit 1 and say so when a file is out of date
    python scripts/lock.py --upgrade  # write, moving every pin to the newest allowed release
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
HEADER = "# Written by scripts/lock.py: {what}. Universal, hashed, without index addresses.\n"
FILES = {
    "requirements.lock": ("what the packages need to run", [], ["cpu", "multimodal"]),
    "requirements-dev.lock": (
        "the same, with the simulator and the demo, test and lint groups",
        ["dev", "lint"],
        ["cpu", "multimodal", "simulator"],
    ),
}


def compile_lock(name: str, previous: Path, upgrade: bool) -> str:
    """Return the text of one lock file, preferring the pins of ``previous`` unless upgrading."""
    what, groups, extras = FILES[name]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / name
        if previous.exists() and not upgrade:
            shutil.copyfile(previous, output)
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes"]
        command += ["--no-annotate", "--no-header", "--python-version", "3.11"]
        command += [flag for extra in extras for flag in ("--extra", extra)]
        command += [flag for group in groups for flag in ("--group", f"pyproject.toml:{group}")]
        command += [flag for member in [*MEMBERS, "vllm-metal"] for flag in ("--no-emit-package", member)]
        command += ["pyproject.toml", *(f"packages/{member}/pyproject.toml" for member in MEMBERS)]
        subprocess.run([*command, "--output-file", str(output)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [line for line in output.read_text().splitlines() if not line.startswith("-e ")]
    return HEADER.format(what=what) + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--upgrade", action="store_true", help="move every pin to the newest allowed release")
    options = parser.parse_args()
    stale = []
    for name in FILES:
        path = ROOT / name
        text = compile_lock(name, path, options.upgrade)
        if not options.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(name)
    if stale:
        print(f"[lock] expected {' and '.join(stale)} to match pyproject.toml. Run: python scripts/lock.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
