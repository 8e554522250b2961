"""Pytest plugin: kernels run on the GPU where Metal is available, and simulated everywhere else.

Switched on by ``metal_simulator = true`` in the project's pytest settings or by ``--metal-simulator``. It is
installed before tests are collected, so that kernels made at import time are simulated too. A package of its own,
so that a project that does not ask for it imports nothing else.
"""

from typing import cast

import pytest

_HELP = "execute mx.fast.metal_kernel kernels on the CPU where Metal is not available"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the switch and what goes with it."""
    group = parser.getgroup("metal")
    group.addoption("--metal-simulator", action="store_true", help=_HELP)
    group.addoption(
        "--metal-simulator-fast",
        action="store_true",
        help="run each kernel once, in order and without checks: for long tests",
    )
    parser.addini("metal_simulator", _HELP, type="bool", default=False)
    parser.addini(
        "metal_simulator_pretend_metal",
        "whether mx.metal.is_available() answers yes while kernels are simulated",
        type="bool",
        default=False,
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Install the simulator, if this project asks for it and the machine has no Metal."""
    if not _wanted(config):
        return
    from metal_kernels import simulator

    if config.getoption("--metal-simulator-fast"):
        fast = simulator.Settings(checked=False, schedules=(simulator.Schedule.ORDERED,))
        simulator.set_default_settings(fast)
    simulator.install(pretend_metal=cast(bool, config.getini("metal_simulator_pretend_metal")))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give MLX its own function back."""
    if _wanted(config):
        from metal_kernels import simulator

        simulator.uninstall()


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which of the two runs the kernels."""
    if not _wanted(config):
        return None
    from metal_kernels import simulator

    return f"metal kernels: {'simulated' if simulator.is_installed() else 'on the GPU'}"


def _wanted(config: pytest.Config) -> bool:
    return bool(config.getoption("--metal-simulator") or config.getini("metal_simulator"))
