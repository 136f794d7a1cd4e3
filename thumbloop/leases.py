"""Who uses a version's folder: locks on its manifest, shared ones of those who read it and one for itself of
who deletes it. They go with the process that holds them, however it ends; nothing is written."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from thumbloop.artifacts import MANIFEST
from thumbloop.errors import BadPolicyVersion


class Lease:
    """A folder in use: nobody deletes it until the lease is closed."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def close(self) -> None:
        """Let the folder go, also where a process that was forked meanwhile has the file open still."""
        with suppress(OSError):
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()


def hold(folder: Path) -> Lease:
    """Keep a folder from being deleted; waits, moments, for who looks whether it may be.

    Raises BadPolicyVersion: it is not there, or was deleted meanwhile.
    """
    path = folder / MANIFEST
    try:
        lease = Lease(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        raise BadPolicyVersion("manifest_missing", f"{folder.name}: {error.strerror}") from None
    with suppress(OSError):  # a file system without locks: who deletes cannot have one either
        fcntl.flock(lease._handle, fcntl.LOCK_SH)
    if not _is_still(path, lease._handle):
        lease.close()
        raise BadPolicyVersion("manifest_missing", f"{folder.name}: was deleted")
    return lease


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Have a folder for oneself, and say whether that is so: nobody holds it, and nobody can meanwhile.

    Without a manifest nobody ever can. Raises OSError: it cannot be known.
    """
    try:
        handle = os.open(
            folder / MANIFEST, os.O_RDWR | os.O_NONBLOCK
        )  # NFS locks what one may write
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    """Say whether a file that is open has its place still."""
    try:
        there = path.stat()
    except OSError:
        return False
    mine = os.fstat(handle)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
