"""Which process of this machine holds the other end of a loopback connection."""

import os
from functools import lru_cache


@lru_cache(maxsize=4096)
def process_of_port(port: int) -> int | None:
    """The process with local TCP port ``port``; None where /proc does not say (macOS, or it is gone)."""
    inode = _inode(port)
    if inode is None:
        return None
    wanted = f"socket:[{inode}]"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            folder = f"/proc/{pid}/fd"
            if any(os.readlink(f"{folder}/{number}") == wanted for number in os.listdir(folder)):
                return int(pid)
        except OSError:
            continue
    return None


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
