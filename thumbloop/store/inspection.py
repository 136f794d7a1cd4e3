"""Reading a store as it is: nothing is created, migrated or written, whatever is there."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from alembic.script import ScriptDirectory
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    NullPool,
    create_engine,
    func,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError

from thumbloop.config import State
from thumbloop.errors import SettingsError, StoreUnavailable
from thumbloop.store.database import migrations, url_of
from thumbloop.store.schema import events, feedback, interactions

_TIMEOUT_S = 5


@contextmanager
def inspecting(state: State) -> Iterator[Connection]:
    """Open a connection that cannot write.

    Raises SettingsError: there is no database, or its URL is wrong. StoreUnavailable: it does not answer.
    """
    if state.url is None and not state.database_file.is_file():
        raise SettingsError(f"there is no database in {state.folder}")
    try:
        engine = _open(url_of(state))
    except (ArgumentError, ImportError) as error:
        raise SettingsError(f"state.url: {error}") from None
    try:
        with engine.connect().execution_options(postgresql_readonly=True) as connection:
            yield connection
    except DBAPIError as error:
        raise StoreUnavailable(str(error.orig)) from None
    finally:
        engine.dispose()


def _open(url: URL) -> Engine:
    """Return an engine that reads; SQLite is told so by its file's name, others by the connection."""
    if url.get_backend_name() != "sqlite" or not url.database:
        return create_engine(url, hide_parameters=True)
    file = Path(url.database).absolute()
    # Without a log nobody has it open, and SQLite need not make files to share.
    is_idle = not file.with_name(f"{file.name}-wal").exists()
    name = f"file:{quote(str(file))}?mode=ro{'&immutable=1' if is_idle else ''}"
    return create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(name, uri=True, timeout=_TIMEOUT_S),
        poolclass=NullPool,
        hide_parameters=True,
    )


def level(connection: Connection) -> str | None:
    """Return the last migration that was made."""
    found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return None if found is None else str(found)


def known_levels() -> list[str]:
    """Return every migration that this release knows, the last one first."""
    scripts = ScriptDirectory.from_config(migrations())
    return [script.revision for script in scripts.walk_revisions()]


def newest_row_at(connection: Connection) -> float | None:
    """Return when the newest reply, feedback or event was written, as its writer's clock had it."""
    columns = (interactions.c.created_at, feedback.c.created_at, events.c.at)
    found = [connection.scalar(select(func.max(column))) for column in columns]
    return max((at for at in found if at is not None), default=None)
