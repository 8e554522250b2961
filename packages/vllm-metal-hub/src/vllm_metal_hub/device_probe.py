"""What MLX says about this machine, asked in a process of its own so that a crash of it is only a line."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

_PROGRAM = """
import json, sys
import mlx.core as mx
cpu = {cpu!r} or mx.default_device() == mx.cpu
if cpu:
    mx.set_default_device(mx.cpu)
result = {{"version": mx.__version__, "device": "cpu" if cpu else "gpu"}}
result.update({{"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available()}})
try:
    result["facts"] = dict(mx.device_info())
except Exception as error:
    result["facts"] = {{}}
try:
    f = mx.compile(lambda x: mx.exp(x) * 2 + mx.abs(x))
    mx.eval(f(mx.arange(8.0)))
    result["compile"] = None
except Exception as error:
    result["compile"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
print(json.dumps(result, default=str))
"""


@dataclass(frozen=True)
class DeviceProbe:
    """MLX's device; ``error`` is set, and nothing else, when MLX could not be asked."""

    version: str = ""
    target: str = ""  # "metal", "cuda" or "cpu"
    name: str = ""
    memory_bytes: int | None = None
    compile_error: str | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        """One line for people."""
        if self.error:
            return f"unknown ({self.error})"
        memory = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        return f"{self.name} ({self.target}{memory}, MLX {self.version})"


def probe_device(timeout_s: float = 120.0) -> DeviceProbe:
    """Import MLX in a new process, compile and run one small function, and return what it found."""
    cpu = os.environ.get("VLLM_MLX_DEVICE", "").strip().lower() == "cpu"
    program = _PROGRAM.format(cpu=cpu)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return DeviceProbe(error=f"MLX did not answer in {timeout_s:.0f} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return DeviceProbe(error=lines[-1] if lines else f"MLX ended with code {done.returncode}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    facts = found["facts"]
    target = "cpu" if found["device"] == "cpu" else ("metal" if found["metal"] else "cuda")
    memory = facts.get("max_recommended_working_set_size") or facts.get("total_memory") or facts.get("memory_size")
    return DeviceProbe(
        version=found["version"],
        target=target,
        name=str(facts.get("device_name") or facts.get("name") or target.upper()),
        memory_bytes=int(memory) if memory else None,
        compile_error=found["compile"],
    )


def describe_device() -> str:
    """The device on one line."""
    return probe_device().label
