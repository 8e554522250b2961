"""One file from a hub to disk: resumed where it broke off, verified before it counts."""

import errno
import os
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vllm_metal_hub.checksum import Hash, start_hash
from vllm_metal_hub.errors import DiskFullError, IntegrityError, NetworkError
from vllm_metal_hub.snapshot import FileEntry
from vllm_metal_hub.sources.base import ByteStream, TransientError
from vllm_metal_hub.terminal import bytes_text

T = TypeVar("T")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DOWNLOADS_OF_A_BAD_FILE = 3
_MOST_ATTEMPTS = 200


@dataclass(frozen=True)
class Retries:
    """How often something is tried before it is given up; ``note`` hears of every new try."""

    count: int
    note: Callable[[str], None]

    def wait(self, failures: int, error: TransientError, what: str) -> None:
        """Sleep before the next try: what the hub asked for, else longer each time.

        Raises:
            NetworkError: ``failures`` tries have failed already.
        """
        if failures >= self.count:
            raise NetworkError(
                f"[pull] expected {what}, got {error} ({failures} tries). Check the network, or try another source."
            ) from error
        pause = min(0.25 * 2**failures, 10.0) * random.uniform(0.8, 1.2)
        if error.retry_after_s is not None:
            pause = min(error.retry_after_s, 60.0)
        self.note(f"{what}: {error}; trying again in {pause:.1f} s")
        time.sleep(pause)

    def run(self, what: str, ask: Callable[[], T]) -> T:
        """Call ``ask`` until it succeeds or the tries are used up."""
        failures = 0
        while True:
            try:
                return ask()
            except TransientError as error:
                failures += 1
                self.wait(failures, error, what)


def download(
    entry: FileEntry,
    part: Path,
    open_at: Callable[[int], AbstractContextManager[ByteStream]],
    retries: Retries,
    on_bytes: Callable[[int], None],
) -> str:
    """Fill ``part`` with the bytes of ``entry`` and return their digest; an existing part is continued.

    ``on_bytes`` hears of every byte that counts: negative when a part had to be dropped.

    Raises:
        IntegrityError: the bytes were wrong three times.
        NetworkError: the tries are used up; the part stays and is continued next time.
        DiskFullError: no room; the part is removed.
    """
    actual = ""
    for _ in range(_DOWNLOADS_OF_A_BAD_FILE):
        actual = _complete(entry, part, open_at, retries, on_bytes)
        if not entry.digest or actual == entry.digest:
            return actual
        retries.note(f"{entry.path}: got {actual}, expected {entry.digest}; fetching it again")
        on_bytes(-part.stat().st_size)
        part.unlink()
    raise IntegrityError(
        f"[pull] expected {entry.path} with {entry.digest}, got {actual} after {_DOWNLOADS_OF_A_BAD_FILE} downloads. "
        "Something between here and the hub changes bytes: try another endpoint or source."
    )


def _complete(
    entry: FileEntry,
    part: Path,
    open_at: Callable[[int], AbstractContextManager[ByteStream]],
    retries: Retries,
    on_bytes: Callable[[int], None],
) -> str:
    state, have = _resume(entry, part, on_bytes)
    failures = attempts = 0
    while have < entry.size or not part.exists():
        before = have
        try:
            with open_at(have) as stream:
                if stream.start != have:
                    on_bytes(-have)
                    state, have = start_hash(entry.digest, entry.size), 0
                have = _append(entry, part, stream, state, have, on_bytes)
            if have < entry.size:
                raise TransientError(f"the connection ended after {bytes_text(have)} of {bytes_text(entry.size)}")
        except TransientError as error:
            have = part.stat().st_size if part.exists() else 0
            attempts += 1
            failures = 1 if have > before else failures + 1
            retries.wait(failures if attempts < _MOST_ATTEMPTS else retries.count, error, entry.path)
    return f"{entry.digest.split(':')[0] or 'sha256'}:{state.hexdigest()}"


def _resume(entry: FileEntry, part: Path, on_bytes: Callable[[int], None]) -> tuple[Hash, int]:
    """Hash what an earlier try left; a part longer than the file is dropped."""
    state = start_hash(entry.digest, entry.size)
    if not part.exists():
        return state, 0
    have = part.stat().st_size
    if have > entry.size:
        part.unlink()
        return state, 0
    with part.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    on_bytes(have)
    return state, have


def _append(
    entry: FileEntry, part: Path, stream: ByteStream, state: Hash, have: int, on_bytes: Callable[[int], None]
) -> int:
    try:
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            for chunk in stream.chunks:
                block = chunk[: entry.size - have]
                file.write(block)
                state.update(block)
                have += len(block)
                on_bytes(len(block))
                if have == entry.size:
                    break
            file.flush()
            if have == entry.size:
                os.fsync(file.fileno())
    except OSError as error:
        if error.errno in _NO_SPACE:
            part.unlink(missing_ok=True)
            raise DiskFullError(
                f"[pull] expected room for {entry.path} ({bytes_text(entry.size)}), got none at {part.parent} after "
                f"{bytes_text(have)}. Free some space, or move the caches: HF_HOME, VLLM_METAL_HUB_HOME."
            ) from error
        raise
    return have
