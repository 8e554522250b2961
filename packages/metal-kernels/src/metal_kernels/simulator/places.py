"""A line of Metal source as its author counts it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Line ``line`` (from 1) of ``file``, which may be a part of a kernel: its body, header or signature."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"
