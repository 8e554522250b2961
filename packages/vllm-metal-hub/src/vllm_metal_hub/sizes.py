"""Byte counts as people write them."""


def bytes_text(count: int | float) -> str:
    """A byte count as people write it: 98.4 MB, 2.1 GB (powers of ten, as hubs and disks count)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
