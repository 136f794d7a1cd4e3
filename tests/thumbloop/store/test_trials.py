"""What users got in a trial: of each the reply that was over first."""

import pytest

from tests.rows import ANN, BOB, interaction
from thumbloop.config import State
from thumbloop.store import interactions, open_store, trials


@pytest.fixture
def connection(tmp_path):
    engine = open_store(State(folder=tmp_path))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def test_a_reply_that_takes_long_takes_no_others_place(connection):
    def reply(name: str, user, began: float, ended: float) -> None:
        row = interaction(
            name, policy_version=1, user=user, created_at=ended, duration_s=ended - began
        )
        interactions.append(connection, row)

    def firsts() -> list[str]:
        found = trials.first_replies(connection, "default", [1], since=5.0)
        return [each.response_id for each in found]

    reply("r2", ANN, began=14.0, ended=15.0)
    reply("r4", BOB, began=16.0, ended=18.0)
    assert firsts() == ["r2", "r4"]
    reply("r1", ANN, began=10.0, ended=30.0)
    reply("r3", BOB, began=15.0, ended=20.0)
    assert firsts() == ["r2", "r4"]
