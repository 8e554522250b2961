"""The checks of ``vllm-metal doctor``; each returns what it found and what to do about it."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Literal

from vllm_metal_hub.device_probe import DeviceProbe, probe_device
from vllm_metal_hub.errors import UsageError
from vllm_metal_hub.settings import VARIABLES, HubSettings
from vllm_metal_hub.sizes import bytes_text

Status = Literal["ok", "warn", "fail"]
ENTRY_POINTS = {
    "vllm.platform_plugins": ("metal",),
    "vllm.general_plugins": ("metal_general", "metal_hub"),
}
_PLATFORM_PROGRAM = """
import json
from vllm.platforms import current_platform as platform
print(json.dumps({"class": f"{type(platform).__module__}.{type(platform).__qualname__}"}))
"""
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_LOW_DISK_BYTES = 10 * 10**9


@dataclass(frozen=True)
class Check:
    """One line of the report; ``advice`` is what to do when ``status`` is not "ok"."""

    name: str
    status: Status
    found: str
    advice: str = ""


def system_checks() -> Iterator[Check]:
    """Python, operating system, chip."""
    running = sys.version_info
    right = (3, 11) <= running[:2] < (3, 15)
    yield Check("Python", "ok" if right else "fail", platform.python_version(), "Use Python 3.11 to 3.14.")
    if sys.platform == "darwin":
        arm = platform.machine() == "arm64"
        found = f"macOS {platform.mac_ver()[0]}, {_sysctl('machdep.cpu.brand_string') or platform.machine()}"
        yield Check("System", "ok" if arm else "fail", found, "Use an arm64 Python on Apple silicon, not Rosetta.")
    else:
        yield Check("System", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def mlx_checks() -> Iterator[Check]:
    """MLX's version, device and memory, and whether it can compile there."""
    probe = probe_device()
    if probe.error:
        yield Check("MLX", "fail", probe.error, "Install mlx (on Linux: mlx[cpu] or mlx[cuda]), then run this again.")
        return
    yield Check("Device", *_device_status(probe))
    yield _compile_check(probe)


def _device_status(probe: DeviceProbe) -> tuple[Status, str, str]:
    if sys.platform == "darwin" and probe.target == "cpu":
        asked = os.environ.get("VLLM_MLX_DEVICE", "").lower() == "cpu"
        advice = "Unset VLLM_MLX_DEVICE." if asked else "Metal is not available here (a virtual machine?)."
        return "warn", probe.label, advice
    return "ok", probe.label, ""


def _compile_check(probe: DeviceProbe) -> Check:
    if probe.target != "cpu":
        status: Status = "fail" if probe.compile_error else "ok"
        found = probe.compile_error or "kernels compile"
        return Check("Compiler", status, found, "Update the operating system's GPU driver or MLX.")
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    advice = "Install a C++ compiler (g++): MLX compiles its CPU kernels with it."
    if probe.compile_error:
        return Check("Compiler", "fail", f"{compiler or 'no C++ compiler'}: {probe.compile_error}", advice)
    return Check("Compiler", "ok", compiler or "kernels compile", advice)


def vllm_checks() -> Iterator[Check]:
    """Versions, the plugin's entry points, and the platform that vLLM chooses."""
    for name, advice in (
        ("vllm", "Install vllm 0.32 as docs/install.md says."),
        ("torch", "Install torch 2.13."),
    ):
        found = _version(name)
        yield Check(name, "ok" if found else "fail", found or "not installed", advice)
    for group, names in ENTRY_POINTS.items():
        present = {point.name for point in entry_points(group=group)}
        missing = [name for name in names if name not in present]
        found = f"{group}: {', '.join(names)}" if not missing else f"{group}: {', '.join(missing)} not registered"
        advice = "Reinstall vllm-metal-plugin and vllm-metal-hub in this environment."
        yield Check("Plugin", "fail" if missing else "ok", found, advice)
    yield _platform_check()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _platform_check(timeout_s: float = 180.0) -> Check:
    advice = "See the lines below about the environment; run with VLLM_LOGGING_LEVEL=DEBUG for vLLM's own reasons."
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PLATFORM_PROGRAM],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check("Platform", "fail", f"vLLM did not answer in {timeout_s:.0f} s", advice)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return Check("Platform", "fail", lines[-1].strip() if lines else f"exit code {done.returncode}", advice)
    chosen = str(json.loads(done.stdout.strip().splitlines()[-1])["class"])
    ours = chosen.startswith("vllm_metal_plugin.")
    return Check("Platform", "ok" if ours else "fail", f"vLLM chooses {chosen}", advice)


def environment_checks() -> Iterator[Check]:
    """Variables that are set, and those that quietly switch the plugin off."""
    yield from _trap_checks()
    set_names = sorted(name for name in os.environ if name.startswith(("VLLM_METAL_", "VLLM_MLX_")))
    others = [name for name in _HUB_VARIABLES if name in os.environ]
    known = _plugin_variables() | set(VARIABLES)
    for name in [*set_names, *others]:
        if name == "VLLM_METAL_HUB_RESOLVED":
            continue
        value = "set" if any(word in name for word in _SECRET) else repr(os.environ[name])
        unknown = name in set_names and name not in known
        yield Check(name, "warn" if unknown else "ok", value, "No variable has this name; check its spelling.")
    yield from _value_checks()


_HUB_VARIABLES = (
    "VLLM_USE_MODELSCOPE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "HF_TOKEN", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN", "MODELSCOPE_CACHE", "MODELSCOPE_API_TOKEN",
    "HTTPS_PROXY", "https_proxy",
)  # fmt: skip


def _trap_checks() -> Iterator[Check]:
    target = os.environ.get("VLLM_TARGET_DEVICE")
    if target:
        status: Status = "fail" if target == "cpu" else "warn"
        advice = "Unset it: it is for building vLLM. With cpu, vLLM ignores every platform plugin."
        yield Check("VLLM_TARGET_DEVICE", status, repr(target), advice)
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None:
        allowed = {name.strip() for name in plugins.split(",")}
        hidden = [name for names in ENTRY_POINTS.values() for name in names if name not in allowed]
        advice = f"Unset it, or add: {','.join(hidden)}"
        yield Check("VLLM_PLUGINS", "fail" if hidden else "ok", f"{plugins!r} hides {hidden or 'nothing'}", advice)
    protocol = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if protocol not in (None, "0"):
        yield Check("VLLM_USE_V2_MODEL_RUNNER", "fail", repr(protocol), "Unset it: the plugin speaks protocol 1.")
    if not target and plugins is None and protocol in (None, "0"):
        yield Check("Traps", "ok", "VLLM_TARGET_DEVICE, VLLM_PLUGINS and VLLM_USE_V2_MODEL_RUNNER are not in the way")


def _plugin_variables() -> set[str]:
    from vllm_metal_plugin.envs import TABLE

    return {row.name for row in TABLE}


def _value_checks() -> Iterator[Check]:
    from vllm_metal_plugin.envs import read_envs
    from vllm_metal_plugin.errors import EnvironmentVariableError

    try:
        read_envs()
        HubSettings.from_env()
    except (EnvironmentVariableError, UsageError) as error:
        yield Check("Values", "fail", str(error), "Correct the variable.")


def cache_checks() -> Iterator[Check]:
    """Where models are kept, how much of it, and the room that is left."""
    try:
        settings = HubSettings.from_env()
    except UsageError as error:
        yield Check("Caches", "fail", str(error), "Correct the variable.")
        return
    caches = {
        "Hugging Face cache": settings.hf_cache,
        "ModelScope cache": settings.modelscope_cache,
        "vllm-metal cache": settings.home,
    }
    if settings.modelscope_import:
        caches["VLLM_METAL_MODELSCOPE_CACHE"] = settings.modelscope_import
    for name, path in caches.items():
        found = f"{path}: {bytes_text(_disk_usage(path))}" if path.exists() else f"{path}: not there yet"
        yield Check(name, "ok", found)
    yield from _free_space(caches.values())


def _disk_usage(path: Path) -> int:
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            try:
                stat = os.lstat(os.path.join(folder, file))
            except OSError:
                continue
            total += stat.st_size if not os.path.islink(os.path.join(folder, file)) else 0
    return total


def existing_parent(path: Path) -> Path:
    """The nearest folder above ``path``, or itself, that exists."""
    while not path.exists():
        path = path.parent
    return path


def _free_space(paths: Iterable[Path]) -> Iterator[Check]:
    seen: set[int] = set()
    for path in map(existing_parent, paths):
        device = path.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(path).free
        status: Status = "ok" if free > _LOW_DISK_BYTES else "warn"
        writable = os.access(path, os.W_OK)
        found = f"{bytes_text(free)} free at {path}" + ("" if writable else ", not writable")
        yield Check("Disk", status if writable else "warn", found, "Free some space, or move the caches: HF_HOME.")
