"""Which process of this machine holds the other end of a loopback connection."""

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache


@lru_cache(maxsize=4096)
def process_of_port(port: int) -> int | None:
    """The process with local TCP port ``port``; None where /proc does not say (macOS, or it is gone)."""
    inode = _inode(port)
    if inode is None:
        return None
    wanted = f"socket:[{inode}]"
    return next((int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if wanted in _open_files(pid)), None)


def _open_files(pid: str) -> Iterator[str]:
    """What a process has open; a file that it closes meanwhile is passed over."""
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for number in os.listdir(folder):
            with contextlib.suppress(OSError):
                yield os.readlink(f"{folder}/{number}")


def command_of(pid: int | None) -> str:
    """What a process was started as, or calls itself; empty where that cannot be known."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _inode(port: int) -> str | None:
    suffix = f":{port:04X}"
    try:
        with open("/proc/net/tcp") as table:
            for line in table:
                fields = line.split()
                if len(fields) > 9 and fields[1].endswith(suffix) and fields[9] != "0":
                    return fields[9]
    except OSError:
        return None
    return None
