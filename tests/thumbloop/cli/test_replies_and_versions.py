"""What the command line says of replies, versions and users, and has done about them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.commands import rated, replies
from tests.publishing import publisher_of
from tests.rows import finished_round, version
from tests.serving import Running
from thumbloop.config import State
from thumbloop.store import deployments
from thumbloop.store import versions as store_versions
from thumbloop.types import VersionState

SETTINGS = {"settings": {"ppo": {"kl_coef": 0.125}}}


async def test_a_reply_is_rated(server: Running, thumbloop: Any):
    await thumbloop("generate", "hello", "--user", "ann")
    (stored,) = replies(server)
    rate = ("rate", stored.response_id)
    done = await thumbloop(*rate, "up", "--user", "ann", "--comment", "lovely")
    assert (done.exit_code, done.stdout) == (0, "feedback 1 for version 0\n")
    done = await thumbloop(*rate, "down", "--user", "ann")
    assert done.stdout == "feedback 2 for version 0\n"
    assert [(r.response_id, r.value) for r in rated(server)] == [(stored.response_id, 0)]


async def test_a_thumb_is_up_or_down(server: Running, thumbloop: Any):
    done = await thumbloop("rate", "r", "sideways")
    assert done.exit_code == 2
    assert "has to be up or down" in done.stderr


async def test_a_version_is_taken_back_and_promoted_again(
    server: Running, tiny_model: Path, state: State, thumbloop: Any
):
    assert server.database is not None
    publisher_of(server, tiny_model, state).publish(1)
    await server.serves(1)
    done = await thumbloop("rollback", "--reason", "it swears")
    assert (done.exit_code, done.stdout) == (0, "version 0 is current, version 1 is rolled back\n")
    done = await thumbloop("versions")
    assert "it swears" in done.stdout
    done = await thumbloop("promote", "1")
    assert (done.exit_code, done.stdout) == (0, "version 1 is current, version 0 is retired\n")
    done = await thumbloop("rollback", "0", "--expected", "0")
    assert done.exit_code == 1
    assert done.stderr == "error: version 0 is not current, version 1 is\n"
    done = await thumbloop("promote", "7", "--expected", "1")
    assert (done.exit_code, done.stderr) == (1, "error: there is no version 7\n")


async def test_versions_are_shown_with_their_states(thumbloop: Any):
    done = await thumbloop("versions")
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.stdout.splitlines() if re.match(r"│ 0 ", line)]
    assert "current" in row


async def test_where_a_version_comes_from_is_shown(
    server: Running, tiny_model: Path, state: State, thumbloop: Any
):
    assert server.database is not None
    reply = await server.generate("hello", user_id="ann")
    thumb = await server.client.rate(reply.response_id, up=True, user_id="ann")
    publisher = publisher_of(server, tiny_model, state)
    row = publisher.write(1, alter=lambda manifest: manifest.model_copy(update=SETTINGS))
    row = replace(row, feedback_count=31, first_feedback_id=5, last_feedback_id=44)
    assert row.round_id is not None
    used = {"new_feedback": (thumb.feedback_id,), "rollouts": (reply.response_id,)}
    with server.database.begin() as connection:
        done = finished_round(1, round_id=row.round_id, **used)
        store_versions.finish_round(connection, done, row)
    await server.serves(1)
    publisher.publish(2, 1)
    await server.serves(2)

    done = await thumbloop("lineage", "1")
    assert done.exit_code == 0, done.output
    rows = [re.split(r" *│ *", line)[1:-1] for line in done.stdout.splitlines() if "│" in line]
    assert rows == [
        ["1", "retired", "31", "5 to 44", "0", "1"],
        ["0", "retired", "0", "", "0", "0"],
    ]
    assert "learned from 31 thumbs and preferences, thumbs with ids in 5 to 44" in done.stdout
    assert '"kl_coef": 0.125' in done.stdout
    done = await thumbloop("lineage")
    assert re.search(r"│ 2 +│ current", done.stdout)
    assert "tainted" not in (await thumbloop("versions")).stdout

    done = await thumbloop("lineage", "--user", "ann")
    assert done.exit_code == 0, done.output
    assert re.search(r"│ 1 +│ 1 +│ 0 +│ 1 +│", done.stdout)
    assert "grown from them: 2\n" in done.stdout
    done = await thumbloop("lineage", "--user", "ann", "--subject", "another")
    assert done.stdout == "no version learned from this user\n"

    done = await thumbloop("forget", "ann", "--yes")
    assert done.exit_code == 0, done.output
    assert done.stdout == "erased 1 replies and 1 thumbs and preferences\ntainted versions: 1, 2\n"
    done = await thumbloop("versions")
    assert done.stdout.count("tainted") == 2
    done = await thumbloop("lineage")
    assert re.search(r"│ 1 +│ retired, tainted", done.stdout)
    assert not re.search(r"│ 0 +│ retired, tainted", done.stdout)


async def test_nobody_is_forgotten_by_mistake(server: Running, thumbloop: Any):
    await server.generate("hello", user_id="ann")
    done = await thumbloop("forget", "ann")  # nobody says yes
    assert done.exit_code == 1
    assert len(replies(server)) == 1
    assert (await thumbloop("forget")).exit_code == 2
    done = await thumbloop("forget", "bob", "--yes")
    assert done.stdout == "erased 0 replies and 0 thumbs and preferences\ntainted versions: none\n"
    assert len(replies(server)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("1", "--user", "ann"), "not both"), (("--subject", "x"), "needs a --user")],
)
async def test_lineage_is_of_a_version_or_of_a_user(
    thumbloop: Any, arguments: tuple[str, ...], words: str
):
    done = await thumbloop("lineage", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


async def test_a_version_whose_folder_was_deleted_is_shown_as_such(server: Running, thumbloop: Any):
    assert server.database is not None
    with server.database.begin() as connection:
        store_versions.finish_round(connection, finished_round(1), version(1))
        deployments.set_state(connection, "default", 1, VersionState.REJECTED, at=1.0)
        deployments.collect(connection, "default", 1, at=2.0, reason="")
    done = await thumbloop("versions")
    first, second = done.stdout.partition("│ 1 ")[2].splitlines()[:2]  # it is wrapped
    assert "rejected," in first
    assert "deleted" in second
