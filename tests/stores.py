"""Empty stores, migrated once and copied: eight migrations take longer than most tests that need a store. What
creates and migrates one has tests of its own, in tests/thumbloop/store.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from thumbloop.config import State
from thumbloop.folders import make_folder
from thumbloop.store import open_store


def empty_state(folder: Path) -> State:
    """Return a state folder whose store is there, and empty if it was not there before."""
    state = State(folder=folder)
    make_folder(folder)
    if not state.database_file.exists():
        state.database_file.write_bytes(_migrated())
    return state


@cache
def _migrated() -> bytes:
    with TemporaryDirectory() as folder:
        state = State(folder=Path(folder))
        open_store(state).dispose()
        return state.database_file.read_bytes()
