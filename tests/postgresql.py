"""A PostgreSQL of our own, on a socket in a folder of its own."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text

_OWNER = "postgres"  # Debian's account for it; it refuses to run as root
_QUICK = "-c fsync=off -c listen_addresses="
_PROGRAMS = Path("/usr/lib/postgresql")  # where Debian keeps them, by version


class Cluster:
    """A server that runs; `new_database` returns the URL of one that is blank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0
        self._admin = create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT")

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://{_OWNER}@/{database}?host={self._folder}"

    def new_database(self) -> str:
        self._made += 1
        name = f"test_{self._made}"
        self.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def break_connections(self) -> None:
        """End all connections but the administrator's, as a restart does."""
        self.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname ~ '^test_'"
        )

    def execute(self, statement: str) -> None:
        """Run a statement as the administrator."""
        with self._admin.connect() as connection:
            connection.execute(text(statement))

    def close(self) -> None:
        self._admin.dispose()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a blank server, and stop it afterwards."""
    owner = pwd.getpwnam(_OWNER) if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    if owner is not None:
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    data = str(folder / "data")
    try:
        _run(folder, owner, "initdb", "-D", data, "-U", _OWNER, "-A", "trust", "--no-sync")
        options = f"{_QUICK} -c unix_socket_directories={folder}"
        log = str(folder / "log")
        _run(folder, owner, "pg_ctl", "start", "-w", "-D", data, "-l", log, "-o", options)
        try:
            running = Cluster(folder)
            yield running
            running.close()
        finally:
            _run(folder, owner, "pg_ctl", "stop", "-m", "immediate", "-D", data)
    finally:
        shutil.rmtree(folder)


def _run(folder: Path, owner: pwd.struct_passwd | None, program: str, *options: str) -> None:
    as_owner = {} if owner is None else {"user": owner.pw_uid, "group": owner.pw_gid}
    subprocess.run(
        [_find(program), *options],
        cwd=folder,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        **as_owner,
    )


def _find(program: str) -> Path:
    """Return the newest version's program: Debian does not put them on the path."""
    found = shutil.which(program)
    if found:
        return Path(found)
    return max(_PROGRAMS.glob(f"*/bin/{program}"), key=lambda path: int(path.parts[-3]))
