"""Opening the store: one SQLAlchemy engine, migrated under a lock by whoever starts first."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from thumbloop.config import State
from thumbloop.errors import SettingsError, StoreIncompatible, StoreUnavailable

_MIGRATION_LOCK = 7_466_735_071  # any number of our own, for PostgreSQL's advisory lock
_BUSY_TIMEOUT_MS = 10_000


def open_store(state: State) -> Engine:
    """Open the database, creating or migrating it first.

    Raises SettingsError: the folder cannot be written, or the URL is wrong. StoreIncompatible: the
    store is from a newer release. StoreUnavailable: the database cannot be reached.
    """
    try:
        state.folder.mkdir(parents=True, exist_ok=True)
        lock = (state.folder / "migrate.lock").open("w")
    except OSError as error:
        raise SettingsError(
            f"state.folder: {state.folder} cannot be written ({error.strerror});"
            " choose a folder this user may write to"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine = _connect(state)
        try:
            _migrate(engine)
        except DatabaseError as error:  # unreachable, locked, or a file that is no database
            engine.dispose()
            raise StoreUnavailable(f"state: the database does not answer: {error.orig}") from None
    return engine


def _connect(state: State) -> Engine:
    try:
        url = make_url(state.database_url)
        engine = create_engine(url)
    except (ArgumentError, ImportError) as error:
        raise SettingsError(f"state.url: {error}") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    """Set durability: an acknowledged commit survives kill -9 and power loss."""
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, not by the driver
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={_BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    """Take the write lock at once: upgrading a read transaction can fail without waiting."""
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a short read transaction; it never blocks a writer.

    Raises StoreUnavailable: the database is locked or cannot be reached.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection, connection.begin():
            yield connection
    except OperationalError as error:
        raise StoreUnavailable(f"the store cannot be read: {error.orig}") from None


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError:
            head = ScriptDirectory.from_config(config).get_current_head()
            raise StoreIncompatible(
                f"state: the store was written by a newer release (this one knows {head});"
                " upgrade the software, nothing was changed"
            ) from None
