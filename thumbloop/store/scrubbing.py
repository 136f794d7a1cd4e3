"""What SQLite's files hold beyond their rows: remains of what was deleted.

`secure_delete` zeroes what is deleted, but not the copies that stay behind, in the unused part of a page, when rows
move to another page; and the write-ahead log keeps all pages as they were. PostgreSQL sees to both itself, in time.
"""

from sqlalchemy import Engine

from thumbloop.store.database import outside_transactions


def leaves_remains(engine: Engine) -> bool:
    """Say whether the database's files are ours to scrub."""
    return engine.dialect.name == "sqlite"


def rewrite(engine: Engine) -> None:
    """Write the whole file anew, without remains; nobody else writes meanwhile. Raises StoreUnavailable."""
    with outside_transactions(engine) as connection:
        connection.exec_driver_sql("VACUUM")


def empty_log(engine: Engine, patience_s: float) -> bool:
    """Move the log's pages to the file and cut the log to nothing; False: somebody read older pages all the time.

    Readers are waited for, and nobody else writes, for so long at most. Raises StoreUnavailable.
    """
    with outside_transactions(engine) as connection:
        usual_ms = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        connection.exec_driver_sql(f"PRAGMA busy_timeout={round(patience_s * 1000)}")
        try:
            is_busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
        finally:
            connection.exec_driver_sql(f"PRAGMA busy_timeout={usual_ms}")
    return not is_busy
