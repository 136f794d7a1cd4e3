"""How commands reach a store and the versions beside it, without a server: their common options."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from sqlalchemy import Engine

from thumbloop.config import ServerConfig, State, load
from thumbloop.connecting import saying_in_one_line
from thumbloop.errors import SettingsError
from thumbloop.store import open_store

Config = Annotated[
    Path | None,
    typer.Option(
        help="The server's settings, YAML; THUMBLOOP_SERVER_STATE__FOLDER and others hold, too."
    ),
]
StateFolder = Annotated[
    Path | None, typer.Option("--state", help="The state folder; absent: that of the settings.")
]
Url = Annotated[
    str | None, typer.Option("--url", help="URL of the database, where it is not in the folder.")
]


class Opened(NamedTuple):
    """A store, and where the versions are that it knows."""

    store: Engine
    versions: Path


@contextmanager
def state_at(config: Path | None, folder: Path | None, url: str | None) -> Iterator[Opened]:
    """Open a store that is there, whether or not a server runs on it; what goes wrong is said in one line."""
    with saying_in_one_line():
        state = _state(config, folder, url)
        store = open_store(state)
        try:
            yield Opened(store, state.versions)
        finally:
            store.dispose()


def _state(config: Path | None, folder: Path | None, url: str | None) -> State:
    """Return where the state is. Raises SettingsError: nothing is there, or settings are wrong."""
    state = load(ServerConfig, config).state
    given = {"folder": folder, "url": url}
    state = state.model_copy(update={name: value for name, value in given.items() if value})
    if not state.folder.is_dir() or (state.url is None and not state.database_file.is_file()):
        raise SettingsError(
            f"state.folder: there is no store in {state.folder}; name the server's with --state or --config"
        )
    return state
