"""Opening the store: one SQLAlchemy engine, migrated under a lock by whoever starts first."""

import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, OperationalError

from thumbloop.config import State
from thumbloop.errors import SettingsError, StoreIncompatible, StoreUnavailable
from thumbloop.folders import make_folder
from thumbloop.locks import try_lock

# Numbers of our own, for PostgreSQL's advisory locks.
_MIGRATION_LOCK = 7_466_735_071
_TRAINER_LOCK = 7_466_735_072
_WRITING_LOCK = 7_466_735_073
_BUSY_TIMEOUT_MS = 10_000
_READ_ONLY = "25006"
"""PostgreSQL's code of what a database that became read-only answers; drivers count it as an internal error."""


def open_store(state: State) -> Engine:
    """Open the database, creating or migrating it first.

    Raises SettingsError: the folder cannot be written, or the URL is wrong. StoreIncompatible: the
    store is from a newer release. StoreUnavailable: the database cannot be reached.
    """
    try:
        make_folder(state.folder)
        lock = (state.folder / "migrate.lock").open("w")
    except OSError as error:
        raise SettingsError(
            f"state.folder: {state.folder} cannot be written ({error.strerror});"
            " choose a folder this user may write to"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine = _connect(state)
        with ExitStack() as unless_migrated:
            unless_migrated.callback(engine.dispose)
            try:
                _migrate(engine)
            except DatabaseError as error:  # unreachable, locked, or a file that is no database
                raise StoreUnavailable(
                    f"state: the database does not answer: {error.orig}"
                ) from None
            unless_migrated.pop_all()
    return engine


def url_of(state: State) -> URL:
    """Return where the database is; the name of a folder may hold what means something in a URL.

    Raises ArgumentError: it is no URL.
    """
    if state.url is None:
        return URL.create("sqlite", database=str(state.database_file))
    return make_url(state.url)


def _connect(state: State) -> Engine:
    try:
        url = url_of(state)
        engine = create_engine(
            url,
            hide_parameters=True,  # errors go to logs, prompts do not
            pool_pre_ping=url.get_backend_name() != "sqlite",  # a server may have been restarted
        )
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
    options = connection.get_execution_options()
    if not options.get("no_transaction", False):
        read_only = options.get("read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def is_unavailable(error: DBAPIError) -> bool:
    """Say whether the database is locked, full, gone or read-only: it may answer later as if nothing had been."""
    return isinstance(error, OperationalError) or getattr(error.orig, "sqlstate", "") == _READ_ONLY


@contextmanager
def _unavailable(words: str) -> Iterator[None]:
    """Raise StoreUnavailable, with these words, for what may be another time; let all else through."""
    try:
        yield
    except DBAPIError as error:
        if not is_unavailable(error):
            raise
        raise StoreUnavailable(f"{words}: {error.orig}") from None


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a short read transaction; it never blocks a writer.

    Raises StoreUnavailable: the database is locked or cannot be reached.
    """
    with (
        _unavailable("the store cannot be read"),
        engine.connect().execution_options(read_only=True) as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction of the trainer's; any other of them waits until it has ended.

    Raises StoreUnavailable: the database is locked or full, or cannot be reached. If the connection broke
    while it was committing, only the next look can say whether it did.
    """
    with _unavailable("the store cannot be written"), engine.begin() as connection:
        _lock_until_commit(connection, _WRITING_LOCK)
        yield connection


@contextmanager
def outside_transactions(engine: Engine) -> Iterator[Connection]:
    """Open a connection of SQLite's for what it does in no transaction.

    Raises StoreUnavailable: the database is locked or full, or cannot be reached.
    """
    with (
        _unavailable("the store cannot be written"),
        engine.connect().execution_options(no_transaction=True) as connection,
    ):
        yield connection


def hold_off_trainer(connection: Connection) -> None:
    """Wait for the trainer's transaction, and let it begin no other until this one has ended."""
    _lock_until_commit(connection, _WRITING_LOCK)


@contextmanager
def only_trainer(engine: Engine) -> Iterator[None]:
    """Hold the lock that lets one trainer learn from a store, whatever its state folder.

    It goes with the process, on PostgreSQL also with its connection, however the trainer ends. Raises
    SettingsError: another trainer has the lock. StoreUnavailable: the database cannot be read.
    """
    with _trainer_lock(engine) as taken:
        if not taken:
            raise SettingsError("state.url: another trainer works on this database; stop it first")
        yield


def _trainer_lock(engine: Engine) -> AbstractContextManager[bool]:
    """Return what holds the lock, and says whether it could be had."""
    if engine.dialect.name == "postgresql":
        return _session_lock(engine)
    with reading(engine) as connection:
        files = text("SELECT file FROM pragma_database_list WHERE name = 'main'")
        file = connection.scalar(files)  # links are followed; empty in memory
    return try_lock(Path(f"{file}-trainer")) if file else nullcontext(True)


@contextmanager
def _session_lock(engine: Engine) -> Iterator[bool]:
    """Hold an advisory lock of PostgreSQL's."""
    with ExitStack() as stack:
        with _unavailable("the store cannot be read"):
            connection = stack.enter_context(engine.connect())
            taken = connection.scalar(text(f"SELECT pg_try_advisory_lock({_TRAINER_LOCK})"))
            connection.commit()  # the lock outlives the transaction, which must not stay open
        try:
            yield bool(taken)
        finally:
            connection.invalidate()  # back in the pool, the connection would keep the lock


def _lock_until_commit(connection: Connection, number: int) -> None:
    """Wait for a lock of PostgreSQL's; SQLite's writers queue anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({number})"))


def migrations() -> Config:
    """Return where the migrations are."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _migrate(engine: Engine) -> None:
    config = migrations()
    with engine.begin() as connection:
        _lock_until_commit(connection, _MIGRATION_LOCK)
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError:
            head = ScriptDirectory.from_config(config).get_current_head()
            raise StoreIncompatible(
                f"state: the store was written by a newer release (this one knows {head});"
                " upgrade the software, nothing was changed"
            ) from None
