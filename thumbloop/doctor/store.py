"""The store: its folder, its disk, its database, and the clock of who wrote into it."""

import os
import shutil
import time
from pathlib import Path

from thumbloop.doctor.findings import Finding, Subject, ok, warning, wrong
from thumbloop.errors import SettingsError, StoreUnavailable, ThumbloopError
from thumbloop.store import inspection

_MOUNTS = Path("/proc/mounts")
_SHARED = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "glusterfs", "lustre", "vboxsf")
_GIB = 1 << 30
_LITTLE, _TOO_LITTLE = _GIB, _GIB // 10
_CLOCK_S = 5.0  # by which clocks of one machine never differ


def folder(subject: Subject) -> Finding:
    """Look whether the state folder can be written, or made."""
    where = subject.server.state.folder
    if where.exists() and not where.is_dir():
        return wrong("state folder", f"{where} is a file", "choose another state.folder")
    nearest = _nearest(where)
    if not os.access(nearest, os.W_OK | os.X_OK):
        return wrong(
            "state folder",
            f"{nearest} cannot be written",
            "choose a folder that this user may write to, or change its owner",
        )
    return ok("state folder", f"{where}{'' if where.exists() else ', not made yet'}")


def disk(subject: Subject) -> Finding:
    """Look for room beside database and versions."""
    free = shutil.disk_usage(_nearest(subject.server.state.folder)).free
    found = f"{free / _GIB:.1f} GiB free"
    advice = "make room: replies and versions are refused on a full disk"
    if free < _TOO_LITTLE:
        return wrong("disk", found, advice)
    if free < _LITTLE:
        return warning("disk", found, advice)
    return ok("disk", found)


def file_system(subject: Subject) -> Finding:
    """Look whether the folder's file system has locks that SQLite can rely on."""
    kind = file_system_of(_nearest(subject.server.state.folder).resolve())
    if not kind.startswith(_SHARED):
        return ok("file system", kind or "unknown")
    if subject.server.state.url is None:
        return wrong(
            "file system",
            f"{kind}, on which SQLite's locks do not hold",
            "a folder on a local disk, or PostgreSQL by state.url",
        )
    return warning("file system", kind, "see that it has flock, which keeps folders in use")


def database(subject: Subject) -> Finding:
    """Look whether the database answers, and how far it is migrated."""
    try:
        with inspection.inspecting(subject.server.state) as connection:
            level = inspection.level(connection)
    except SettingsError as error:
        if subject.server.state.url is None:
            return ok("database", f"{error}; the first start makes it")
        return wrong("database", str(error), "mend state.url; its driver has to be installed")
    except StoreUnavailable as error:
        return wrong("database", str(error), "see that it can be reached, and is the right one")
    newest, *older = inspection.known_levels()
    if level == newest:
        return ok("database", f"answers, migrated to {level}")
    if level in older:
        advice = f"the next start migrates it to {newest}; back it up before"
        return warning("database", f"migrated to {level}", advice)
    return wrong("database", f"written by a newer release ({level})", "upgrade the software")


def clock(subject: Subject) -> Finding:
    """Look whether the newest row is from the future."""
    try:
        with inspection.inspecting(subject.server.state) as connection:
            newest = inspection.newest_row_at(connection)
    except ThumbloopError:
        return ok("clock", "no row to compare with")
    if newest is None:
        return ok("clock", "no row to compare with")
    ahead_s = newest - time.time()
    if ahead_s > _CLOCK_S:
        return wrong(
            "clock",
            f"the newest row is {ahead_s:.0f} s from now",
            "set the clock, and keep it (chrony, systemd-timesyncd) on every machine that writes",
        )
    return ok("clock", f"the newest row is {-ahead_s:.0f} s old")


def file_system_of(path: Path) -> str:
    """Return the kind of file system that holds a path, empty where the kernel does not say."""
    best, kind = "", ""
    for line in _MOUNTS.read_text().splitlines():
        _device, mount, found, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())
