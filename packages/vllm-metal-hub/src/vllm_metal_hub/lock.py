"""One process at a time pulls one snapshot; the others wait, and say for whom."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, note: Callable[[str], None], say_every_s: float = 10.0) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel releases it if this process dies.

    ``note`` hears who is in the way, at once and then every ``say_every_s`` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        said = float("-inf")
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said >= say_every_s:
                    said = time.monotonic()
                    file.seek(0)
                    note(f"waiting for process {file.read().strip() or 'unknown'}, which pulls the same")
                time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
