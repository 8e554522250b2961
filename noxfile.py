"""What a change must pass: ``uvx nox`` runs all of it on a Linux machine without a GPU, two sessions at a time."""

import fcntl
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2026.8"
nox.options.default_venv_backend = "uv"
# Much of a session is waiting: for packages, for one core to start a server, for networks that tests let fail.
nox.options.allow_parallel = True
# Sessions that are named run one after another, and show what they print as they go.
nox.options.parallel = 1 if any(word.startswith(("-s", "-e", "--session")) for word in sys.argv) else 2
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
# For mypy everything in these is Any, installed or not.
WITHOUT_TYPES = ("vllm", "torch", "torchvision")
DIST = ROOT / "dist"
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
    with Path(session.virtualenv.location).with_name("apt.lock").open("w") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        if shutil.which(program) is None and shutil.which("apt-get"):
            sudo = ("sudo",) if shutil.which("sudo") else ()
            session.run(*sudo, "apt-get", "update", "-qq", external=True)
            session.run(*sudo, "apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages, external=True)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run tests: in one process beside another session, else in two, and each file in one of them."""
    spread = () if session.parallel else ("-n", "2", "--dist", "loadfile")
    session.run("pytest", *arguments, "-q", "-m", "not slow", *spread, *session.posargs, env=TEST_ENV)


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("--group", "lint", "--constraint", "requirements-dev.lock")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=PYTHON)
def layers(session: nox.Session) -> None:
    """Check the import rules between the packages and, exhaustively, inside each."""
    session.install("--group", "lint", "--constraint", "requirements-dev.lock")
    session.install("--no-deps", *(f"./packages/{name}" for name in LAYERS))
    session.run("lint-imports")


@nox.session(python=PYTHON)
def wheels(session: nox.Session) -> None:
    """Build every wheel and look inside."""
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("uv", "build", "--all-packages", "--wheel", "--out-dir", str(DIST), "--quiet", external=True)
    session.run("python", "scripts/check_wheels.py", str(DIST))


# The longest goes first, so that it does not end alone.
@nox.session(python=PYTHON, requires=["wheels"])
def e2e(session: nox.Session) -> None:
    """Install the wheels with install.sh as a user does, and drive the real server with real clients and weights."""
    apt_install(session, "g++", "g++")
    venv = session.virtualenv.location
    session.run("bash", "scripts/install.sh", "--wheels", str(DIST), "--venv", venv, env=TEST_ENV, external=True)
    session.install("--group", "test", "--group", "demo", "--constraint", "requirements-dev.lock")
    pytest(session, "tests/e2e")


@nox.session(python=PYTHON)
@nox.parametrize("dist", list(LAYERS), ids=list(LAYERS))
def tests(session: nox.Session, dist: str) -> None:
    """Run one package's tests where only that package and the layers below it are installed."""
    # mx.compile on MLX's CPU backend calls a C++ compiler.
    apt_install(session, "g++", "g++")
    install(session, dist, "test", "demo", extras=TEST_EXTRAS.get(dist))
    check = f"--jaxtyping-packages={LAYERS[dist]},beartype.beartype"
    pytest(session, f"packages/{dist}/tests", check)


def slow_tests(session: nox.Session, dist: str) -> None:
    """Run the tests of a package that are left to the night."""
    apt_install(session, "g++", "g++")
    install(session, dist, "test", "demo", extras=TEST_EXTRAS.get(dist))
    spread = () if session.posargs else ("-n", "2")
    session.run("pytest", f"packages/{dist}/tests", "-q", "-m", "slow", *spread, *session.posargs, env=TEST_ENV)


@nox.session(python=PYTHON, default=False, tags=["nightly"])
def parity(session: nox.Session) -> None:
    """Compare every architecture with mlx-lm's own generation, and run the other slow model tests."""
    slow_tests(session, "metal-models")


@nox.session(python=PYTHON, default=False, tags=["nightly"])
def combinations(session: nox.Session) -> None:
    """Check and run, in the simulator, every combination of types and sizes that kernels are dispatched with."""
    slow_tests(session, "metal-kernels")


@nox.session(python=PYTHON, default=False, tags=["nightly"])
def soak(session: nox.Session) -> None:
    """Serve thousands of requests, and run the plugin's other slow tests."""
    slow_tests(session, "vllm-metal-plugin")


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    overrides = Path(session.create_tmp()) / "overrides.txt"
    overrides.write_text("".join(f"{name}; sys_platform == 'never'\n" for name in WITHOUT_TYPES))
    paths = [f"./packages/{name}" + ("[cpu]" if name == "metal-kernels" else "") for name in LAYERS]
    locked = ("--constraint", "requirements-dev.lock", "--overrides", str(overrides))
    session.install(*paths, "uvicorn", "--group", "lint", "--group", "test", *locked)  # vllm would bring uvicorn
    session.run("mypy", *(flag for name in LAYERS.values() for flag in ("-p", name)))


@nox.session(python=PYTHON)
def lock(session: nox.Session) -> None:
    """Check that both lock files still follow from the pyproject files."""
    session.run("python", "scripts/lock.py", "--check")
