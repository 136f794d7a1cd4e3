"""python fill.py FILE STATE: writes a version and thumbs on its replies into a fresh store.

Runs on the `thumbloop` of an earlier commit too, and so names nothing that came later.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from sqlalchemy import Connection

from thumbloop.config import State
from thumbloop.store import deployments, feedback, interactions, open_store, versions
from thumbloop.types import Interaction, PolicyVersion, Round, User, VersionState


@dataclass(frozen=True, slots=True)
class Said:
    """A thumb: 1 up, 0 down."""

    response_id: str
    user: User
    value: int
    at: float


@dataclass(frozen=True, slots=True)
class History:
    """A version whose parent is the base model, its round's thumbs, and those after it."""

    version: PolicyVersion
    interactions: tuple[Interaction, ...]
    learned: tuple[Said, ...]
    new: tuple[Said, ...]


HISTORY = TypeAdapter(History)
"""A history as JSON; what an earlier commit does not know of it is left out."""


def fill(history: History, state: State) -> None:
    """Write a history into the store, with its version as the current one."""
    version = history.version
    assert version.round_id is not None, "only version 0 comes from no round"
    store = open_store(state)
    with store.begin() as connection:
        for interaction in history.interactions:
            interactions.append(connection, interaction)
        learned = [_submit(connection, said) for said in history.learned]
        at = version.published_at
        done = Round(
            version.round_id,
            version.policy,
            0,
            at,
            at,
            version.version,
            "published",
            {},
            new_feedback=tuple(learned),
        )
        versions.finish_round(connection, done, version)
        deployments.set_state(
            connection, version.policy, version.version, VersionState.CURRENT, at=at
        )
        for said in history.new:
            _submit(connection, said)
    store.dispose()


def _submit(connection: Connection, said: Said) -> int:
    """Store a thumb; return its id."""
    stored = feedback.submit_thumb(connection, said.response_id, said.value, said.user, at=said.at)
    return stored.feedback_id


if __name__ == "__main__":
    fill(HISTORY.validate_json(Path(sys.argv[1]).read_bytes()), State(folder=Path(sys.argv[2])))
