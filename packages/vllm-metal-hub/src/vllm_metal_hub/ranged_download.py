"""One file from a hub to disk: resumed where it broke off, verified before it counts."""

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

from vllm_metal_hub.checksum import algorithm, start_hash
from vllm_metal_hub.errors import DiskFullError, IntegrityError, NetworkError
from vllm_metal_hub.sizes import bytes_text
from vllm_metal_hub.snapshot import FileEntry
from vllm_metal_hub.sources.base import ByteStream, TransientError

T = TypeVar("T")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DOWNLOADS_OF_A_BAD_FILE = 3
_MOST_ATTEMPTS = 200
_REREAD_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 18  # joined before they are written and hashed, unless they take longer than
_BLOCK_S = 0.5


@dataclass(frozen=True)
class Retries:
    """How often something is tried before it is given up; ``note`` hears of every new try."""

    count: int
    note: Callable[[str], None]

    def _wait(self, failures: int, error: TransientError, what: str) -> None:
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

    def run(self, what: str, ask: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Call ``ask`` until it succeeds or the tries are used up.

        A try after which ``progress`` is higher than before it starts the count anew, up to a generous end.
        """
        failures = 0
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            before = progress()
            try:
                return ask()
            except TransientError as error:
                failures = 1 if progress() > before else failures + 1
                self._wait(failures if attempt < _MOST_ATTEMPTS else self.count, error, what)
        raise AssertionError("the last try raises")


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
    growing = _Growing(entry, part, on_bytes)

    def ask() -> None:
        if not growing.complete:
            with open_at(growing.have) as stream:
                growing.take(stream)

    retries.run(entry.path, ask, lambda: growing.have)
    return growing.digest()


class _Growing:
    """The part of one file that is on disk: its length and the hash of its bytes."""

    def __init__(self, entry: FileEntry, part: Path, on_bytes: Callable[[int], None]) -> None:
        self._entry, self._part, self._on_bytes = entry, part, on_bytes
        self._hash = start_hash(entry.digest, entry.size)
        self.have = 0
        if part.exists() and part.stat().st_size > entry.size:
            part.unlink()
        if part.exists():
            self._read_again()

    def _read_again(self) -> None:
        """Hash what an earlier try left."""
        with self._part.open("rb", buffering=0) as file:
            while block := file.read(_REREAD_BYTES):
                self._hash.update(block)
                self.have += len(block)
        self._on_bytes(self.have)

    @property
    def complete(self) -> bool:
        """Every byte is there; whether they are right, the digest says."""
        return self.have == self._entry.size and self._part.exists()

    def digest(self) -> str:
        """The digest of the bytes so far, in the algorithm of the entry's."""
        return f"{algorithm(self._entry.digest)}:{self._hash.hexdigest()}"

    def take(self, stream: ByteStream) -> None:
        """Append a body; one that starts elsewhere than asked for starts the file anew.

        Raises:
            TransientError: the body ended early.
            DiskFullError: no room; the part is removed.
        """
        if stream.start != self.have:
            self._on_bytes(-self.have)
            self._hash, self.have = start_hash(self._entry.digest, self._entry.size), 0
        try:
            with self._part.open("r+b" if self.have else "wb", buffering=0) as file:
                file.seek(self.have)
                for block in _blocks(stream.chunks):
                    self._append(file, block)
                    if self.have == self._entry.size:
                        os.fsync(file.fileno())
                        break
        except OSError as error:
            if error.errno in _NO_SPACE:
                self._part.unlink(missing_ok=True)
                raise self._disk_full() from error
            raise
        if not self.complete:
            raise TransientError(
                f"the connection ended after {bytes_text(self.have)} of {bytes_text(self._entry.size)}"
            )

    def _append(self, file: FileIO, block: bytearray) -> None:
        view = memoryview(block)[: self._entry.size - self.have]
        while view:
            written = file.write(view)  # may be less than all, before the disk is full
            self._hash.update(view[:written])
            self.have += written
            self._on_bytes(written)
            view = view[written:]

    def _disk_full(self) -> DiskFullError:
        return DiskFullError(
            f"[pull] expected room for {self._entry.path} ({bytes_text(self._entry.size)}), got none at "
            f"{self._part.parent} after {bytes_text(self.have)}. Free some space, or move the caches: HF_HOME, "
            "VLLM_METAL_HUB_HOME."
        )


def _blocks(chunks: Iterator[bytes]) -> Iterator[bytearray]:
    """Join what a connection yields into larger blocks; what had arrived when it broke off is yielded first."""
    block = bytearray()
    since = time.monotonic()
    try:
        for chunk in chunks:
            block += chunk
            if len(block) >= _BLOCK_BYTES or time.monotonic() - since > _BLOCK_S:
                yield block
                block, since = bytearray(), time.monotonic()
    except Exception:
        if block:
            yield block
        raise
    if block:
        yield block
