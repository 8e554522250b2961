"""Type-checks and executes Metal kernels on Linux, without a Mac."""

from .check import METAL_VERSIONS, check
from .errors import KernelCompileError, KernelFault, SimulatorError, ToolchainError
from .install import install, installed, uninstall
from .kernel import SimulatedKernel, metal_kernel
from .launch import Schedule
from .report import FaultKind, Finding
from .settings import Settings, settings
from .tokens import Place
from .toolchain import toolchain
from .unit import Source

__all__ = [
    "metal_kernel",
    "SimulatedKernel",
    "install",
    "uninstall",
    "installed",
    "Settings",
    "settings",
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
    "toolchain",
]
