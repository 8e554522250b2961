"""Type-checks and executes Metal kernels on Linux, without a Mac."""

from .errors import KernelCompileError, KernelFault, SimulatorError, ToolchainError
from .kernel import SimulatedKernel, metal_kernel
from .launch import Schedule
from .options import Settings, set_default_settings, settings
from .places import Place
from .report import FaultKind, Finding
from .strict_check import METAL_VERSIONS, check
from .swap import install, installed, is_installed, uninstall
from .unit import Source

__all__ = [
    "metal_kernel",
    "SimulatedKernel",
    "install",
    "uninstall",
    "installed",
    "is_installed",
    "Settings",
    "settings",
    "set_default_settings",
    "Schedule",
    "check",
    "METAL_VERSIONS",
    "Source",
    "Place",
    "Finding",
    "FaultKind",
    "SimulatorError",
    "ToolchainError",
    "KernelCompileError",
    "KernelFault",
]
