"""Apple's chips: the memory that each is sold with, and how fast it is read (Apple's technical specifications)."""

from vllm_metal_hub.errors import UsageError

BANDWIDTH: dict[str, dict[int, int]] = {
    "M1": {8: 68, 16: 68},
    "M1 Pro": {16: 200, 32: 200},
    "M1 Max": {32: 400, 64: 400},
    "M1 Ultra": {64: 800, 128: 800},
    "M2": {8: 100, 16: 100, 24: 100},
    "M2 Pro": {16: 200, 32: 200},
    "M2 Max": {32: 400, 64: 400, 96: 400},
    "M2 Ultra": {64: 800, 128: 800, 192: 800},
    "M3": {8: 100, 16: 100, 24: 100},
    "M3 Pro": {18: 150, 36: 150},
    "M3 Max": {36: 300, 48: 400, 64: 400, 96: 300, 128: 400},
    "M3 Ultra": {96: 819, 256: 819, 512: 819},
    "M4": {16: 120, 24: 120, 32: 120},
    "M4 Pro": {24: 273, 48: 273, 64: 273},
    "M4 Max": {36: 410, 48: 546, 64: 546, 128: 546},
    "M5": {16: 153, 24: 153, 32: 153},
}
"""GB/s of a chip with so many GB of memory."""


def bandwidth(chip: str, memory_bytes: int | None) -> int:
    """Return the bytes per second that a chip with so much memory reads at most.

    Raises:
        UsageError: No such chip is known, or it is not sold with so much memory.
    """
    names = {name.lower(): name for name in BANDWIDTH}
    name = names.get(" ".join(chip.lower().removeprefix("apple ").split()))
    if name is None:
        raise UsageError(f"[plan] expected a chip of Apple's, got {chip}. Use one of: {', '.join(BANDWIDTH)}.")
    sizes = BANDWIDTH[name]
    found = None if memory_bytes is None else sizes.get(memory_bytes >> 30)
    if found is None:
        had = "none" if memory_bytes is None else f"{memory_bytes >> 30}GB"
        choices = ", ".join(f"{size}GB" for size in sizes)
        raise UsageError(f"[plan] expected --memory as {name} is sold, got {had}. Use one of: {choices}.")
    return found * 10**9
