"""Locks on files of the state folder, and on folders of versions: who has them."""

import os
from pathlib import Path
from typing import NamedTuple

from thumbloop.artifacts import MANIFEST
from thumbloop.doctor.findings import Finding, Subject, ok, warning
from thumbloop.types import DEFAULT_POLICY

_LOCKS, _PROCESSES = Path("/proc/locks"), Path("/proc")


class Lock(NamedTuple):
    """A lock that the kernel knows of."""

    process: int
    inode: int


def state(subject: Subject) -> Finding:
    """Look who holds the locks of those who work on the state folder."""
    where = subject.server.state
    named = {where.folder / name for name in ("trainer.lock", "migrate.lock")}
    named |= {where.versions / "claim.lock", Path(f"{where.database_file}-trainer")}
    return _held("locks", named, "a trainer or a start")


def leases(subject: Subject) -> Finding:
    """Look who keeps folders of versions."""
    home = subject.server.state.versions / DEFAULT_POLICY
    return _held("leases", set(home.glob(f"*/{MANIFEST}")), "a server or a trainer")


def _held(check: str, paths: set[Path], by: str) -> Finding:
    """Tell which files are locked; a holder that is gone left the lock to a process that it started."""
    holders: dict[int, set[str]] = {}
    inodes = {path.stat().st_ino: path for path in paths if path.exists()}
    for lock in locks():
        if (path := inodes.get(lock.inode)) is not None:
            name = path.parent.name if path.name == MANIFEST else path.name
            holders.setdefault(lock.process, set()).add(name)
    if not holders:
        return ok(check, "none held")
    found = "; ".join(f"{', '.join(sorted(names))}: {_who(p)}" for p, names in holders.items())
    if any(process > 0 and not (_PROCESSES / str(process)).exists() for process in holders):
        advice = (
            f"a process that the holder started has the file open still: end it, or wait for {by}"
        )
        return warning(check, found, advice)
    return ok(check, found)


def locks() -> list[Lock]:
    """Return the locks that are held now."""
    if not _LOCKS.exists():
        return []
    # 1: FLOCK  ADVISORY  WRITE 4242 fe:00:131 0 EOF; those who wait have an arrow before
    rows = [line.split() for line in _LOCKS.read_text().splitlines() if "->" not in line]
    return [Lock(int(row[4]), int(row[5].rpartition(":")[2])) for row in rows]


def _who(process: int) -> str:
    if process == os.getpid():
        return "this process"
    try:
        words = (_PROCESSES / str(process) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"process {process}, which is gone"
    return f"process {process} ({b' '.join(words[:3]).decode(errors='replace').strip()})"
