"""Check that built wheels hold what they should and that their ranges admit each other.

python scripts/check_wheels.py DIST_DIR
"""

import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

CODE = {"metal-kernels", "metal-kv", "metal-models", "vllm-metal-plugin", "vllm-metal-hub"}
META = "vllm-metal"
# pytest loads its plugins before it instruments what is tested, so this one may not lie inside metal_kernels.
BESIDE = {"metal-kernels": "pytest_metal_simulator"}


def version_tuple(text: str) -> tuple[int, ...]:
    """Return the numbers of a plain release version."""
    return tuple(int(part) for part in text.split("."))


def admits(specifier: str, version: str) -> bool:
    """Return whether a ``>=a,<b`` range holds ``version``."""
    bounds = re.findall(r"(>=|<|==)\s*([\d.]+)", specifier)
    tests = {">=": lambda v, b: v >= b, "<": lambda v, b: v < b, "==": lambda v, b: v == b}
    return all(tests[op](version_tuple(version), version_tuple(bound)) for op, bound in bounds)


def wheel_problems(path: Path, versions: dict[str, str]) -> list[str]:
    """Return every problem of one wheel, each naming the file and the fix."""
    problems = []
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = Parser().parsestr(wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    dist = metadata["Name"]
    code = [name for name in names if ".dist-info/" not in name]
    if dist == META and code:
        problems.append(f"{path.name}: expected no code, got {code[:3]}. Keep bypass-selection on.")
    if dist in CODE:
        top = dist.replace("-", "_")
        allowed = (f"{top}/", f"{BESIDE.get(dist, top)}/")
        problems += [f"{path.name}: {name} lies outside {top}/" for name in code if not name.startswith(allowed)]
        if f"{top}/py.typed" not in names:
            problems.append(f"{path.name}: expected {top}/py.typed. Add the file.")
    if not any("licenses/LICENSE" in name for name in names):
        problems.append(f"{path.name}: expected a LICENSE. Add license-files.")
    for requirement in metadata.get_all("Requires-Dist") or []:
        found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*([^;]*)", requirement)
        if found and found[1] in versions and not admits(found[2], versions[found[1]]):
            problems.append(f"{path.name}: {requirement} excludes {versions[found[1]]}. Mend the range.")
    return problems


def main() -> int:
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    versions = {path.name.split("-")[0].replace("_", "-"): path.name.split("-")[1] for path in wheels}
    problems = [f"no wheel of {name}" for name in sorted((CODE | {META}) - versions.keys())]
    for path in wheels:
        problems += wheel_problems(path, versions)
    print("\n".join(problems) or f"{len(wheels)} wheels hold what they should")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
