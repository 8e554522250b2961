"""Give MLX's CPU backend a fast BLAS on Linux, where its wheel carries the reference one.

The mlx-cpu wheel bundles netlib's ``libblas`` (one scalar thread, about 1 GFLOP/s). A library loaded globally
before MLX answers ``cblas_sgemm`` instead. Affected: mlx-cpu up to and including 0.32.4.
Upstream: https://github.com/ml-explore/mlx (the wheel's ``mlx_cpu.libs`` folder shows which BLAS it has).
"""

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

# Wheels that carry an OpenBLAS with the standard symbol names (NumPy's and SciPy's are renamed).
_WHEELS_WITH_OPENBLAS = ("opencv_python_headless.libs", "opencv_python.libs")


def cpu_wheel_folders() -> list[Path]:
    """Return where packages of the mlx-cpu wheel lie; nothing without it."""
    spec = find_spec("mlx_cpu") or find_spec("mlx")
    roots = [Path(entry).parent for entry in (spec.submodule_search_locations or [])] if spec else []
    return [root for root in roots if (root / "mlx_cpu.libs").is_dir()]


def prefer_fast_blas() -> str:
    """Load an OpenBLAS of this machine for MLX to use; does nothing off Linux or without the mlx-cpu wheel.

    Must run before ``mlx.core`` is first imported in the process. Idempotent.

    Returns:
        The library that MLX will use, or why there is none better than its own.
    """
    if sys.platform != "linux":
        return "not needed: MLX uses Accelerate"
    roots = cpu_wheel_folders()
    if not roots:
        return "not needed: MLX brings its own BLAS"
    if "mlx.core" in sys.modules:
        return "too late: mlx.core was imported before metal_kernels"
    bundled = [
        str(path) for root in roots for name in _WHEELS_WITH_OPENBLAS for path in (root / name).glob("libopenblas*")
    ]
    for library in ("libopenblas.so.0", *bundled):
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    return "no OpenBLAS found: install one (Debian, Ubuntu: apt-get install libopenblas0) for fast CPU matmuls"
