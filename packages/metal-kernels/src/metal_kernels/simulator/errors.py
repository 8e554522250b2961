"""What the simulator raises.

MetalKernelsError
└── SimulatorError
    ├── ToolchainError        no usable clang
    ├── KernelCompileError    Metal's compiler would refuse the kernel
    └── KernelFault           the kernel did something wrong when it ran
"""

from metal_kernels.errors import MetalKernelsError

from .report import Finding


class SimulatorError(MetalKernelsError):
    """Base of everything the simulator raises."""


class ToolchainError(SimulatorError):
    """No clang that can compile kernels was found."""


class KernelCompileError(SimulatorError):
    """The kernel does not compile as Metal."""


class KernelFault(SimulatorError):
    """The kernel compiled and misbehaved; ``findings`` has one entry for each place and kind."""

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings
