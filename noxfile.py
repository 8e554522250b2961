"""What a change must pass: ``uvx nox`` runs all of it on a Linux machine without a GPU."""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
# Bottom up: each layer may import the ones before it.
LAYERS = {
    "metal-kernels": "metal_kernels",
    "metal-kv": "metal_kv",
    "metal-models": "metal_models",
    "vllm-metal-plugin": "vllm_metal_plugin",
    "vllm-metal-hub": "vllm_metal_hub",
}
# What a package's own tests need beyond it: the simulator's clang; transformers' converter of GGUF tokenizers; towers.
TEST_EXTRAS = {
    "metal-kernels": {"metal-kernels": "cpu,simulator"},
    "metal-models": {"metal-models": "multimodal,torch"},
    "vllm-metal-plugin": {"metal-models": "multimodal", "vllm-metal-plugin": "multimodal"},
}
NEEDS_VLLM = ("vllm-metal-plugin", "vllm-metal-hub")
PYTHON = "3.11"
# Each server that a test starts would compile vLLM and torch anew (half a minute) where the variable is set.
TEST_ENV = {"PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def install(session: nox.Session, dist: str, *groups: str, extras: dict[str, str] | None = None) -> None:
    """Install ``dist`` and the layers below it, not editable, with the locked versions of everything else."""
    locked = ("--constraint", "requirements-dev.lock")
    if dist in NEEDS_VLLM:
        # vLLM is built from source without isolation, so what its build imports comes first.
        session.install("--group", "build-vllm", *locked)
    chosen = {"metal-kernels": "cpu"} | (extras or {})
    below = list(LAYERS)[: list(LAYERS).index(dist) + 1]
    paths = [f"./packages/{name}" + (f"[{chosen[name]}]" if name in chosen else "") for name in below]
    session.install(*paths, *(flag for group in groups for flag in ("--group", group)), *locked)


def apt_install(session: nox.Session, program: str, *packages: str) -> None:
    """Install Debian packages when ``program`` is missing and this machine can."""
    if shutil.which(program) is None and shutil.which("apt-get"):
        sudo = ("sudo",) if shutil.which("sudo") else ()
        session.run(*sudo, "apt-get", "update", "-qq", external=True)
        session.run(*sudo, "apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages, external=True)


@nox.session(python=PYTHON)
@nox.parametrize("dist", list(LAYERS), ids=list(LAYERS))
def tests(session: nox.Session, dist: str) -> None:
    """Run one package's tests where only that package and the layers below it are installed."""
    # mx.compile on MLX's CPU backend calls a C++ compiler.
    apt_install(session, "g++", "g++")
    install(session, dist, "test", "demo", extras=TEST_EXTRAS.get(dist))
    check = f"--jaxtyping-packages={LAYERS[dist]},beartype.beartype"
    # Files are spread over two processes: fixtures are made once in a file.
    command = ["pytest", f"packages/{dist}/tests", check, "-q", "-m", "not slow", "-n", "2", "--dist", "loadfile"]
    command += session.posargs
    session.run(*command, env=TEST_ENV)


@nox.session(python=PYTHON, default=False)
def parity(session: nox.Session) -> None:
    """Compare every architecture with mlx-lm's own generation, and run the other slow model tests; nightly."""
    apt_install(session, "g++", "g++")
    install(session, "metal-models", "test", "demo", extras=TEST_EXTRAS["metal-models"])
    session.run("pytest", "packages/metal-models/tests", "-q", "-m", "slow", *session.posargs, env=TEST_ENV)


@nox.session(python=PYTHON)
def layers(session: nox.Session) -> None:
    """Check the import rules between the packages and, exhaustively, inside each."""
    install(session, "vllm-metal-hub", "lint")
    session.run("lint-imports")


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("--group", "lint", "--constraint", "requirements-dev.lock")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "vllm-metal-hub", "lint", "test")
    for name in LAYERS.values():
        session.run("mypy", "-p", name)


@nox.session(python=PYTHON)
def lock(session: nox.Session) -> None:
    """Check that both lock files still follow from the pyproject files."""
    session.run("python", "scripts/lock.py", "--check")


@nox.session(python=PYTHON)
def wheels(session: nox.Session) -> None:
    """Build every wheel, install the meta-package from those files with install.sh, and look inside."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("uv", "build", "--all-packages", "--wheel", "--out-dir", str(dist), "--quiet", external=True)
    session.run("python", "scripts/check_wheels.py", str(dist))
    venv = Path(session.create_tmp()) / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    session.run("bash", "scripts/install.sh", "--wheels", str(dist), "--venv", str(venv), external=True)
    imports = "; ".join(f"import {name}" for name in LAYERS.values())
    session.run(str(venv / "bin/python"), "-c", imports, external=True)


@nox.session(python=PYTHON)
def e2e(session: nox.Session) -> None:
    """Drive the real server with real clients, real (small) weights, on MLX's CPU backend."""
    apt_install(session, "g++", "g++")
    install(session, "vllm-metal-hub", "test", "demo", extras=TEST_EXTRAS["vllm-metal-plugin"])
    # A server's start keeps one core busy.
    command = ["pytest", "tests/e2e", "-q", "-m", "not slow", "-n", "2", "--dist", "loadfile"]
    session.run(*command, *session.posargs, env=TEST_ENV)
