import dataclasses

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError

from tests.rows import candidate, finished_round, interaction
from thumbloop.store import interactions, reading, versions
from thumbloop.types import (
    DEFAULT_POLICY,
    Arm,
    Extent,
    FinishReason,
    Interaction,
    Learning,
    Message,
    Prompt,
    Role,
    Sampling,
    Status,
    Strategy,
    User,
)

# Every field differs from its default and from `interaction()`'s, so that a lost one is seen.
UNLIKE = interaction(
    "unlike",
    policy_version=7,
    user=User("a token's subject", "an id"),
    session_id="s",
    request_id="q",
    prompt=Prompt(messages=(Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "Grüezi 👋\0"))),
    prompt_token_ids=(2**31 - 1, 0),
    sampling=Sampling(3, 0.75, 0.5, 9, 2**64 - 1, ("\n", "END")),
    strategy=Strategy.NONE,
    arm=Arm.FALLBACK,
    reranked=False,
    extent=Extent.LOAD,
    learning=Learning.EXCLUDED,
    status=Status.CANCELLED,
    trainable=False,
    untrainable_reason="greedy",
    policy_digest="x" * 64,
    reward_digest="",
    created_at=1_700_000_123.456,
    candidates=(
        candidate(0, chosen=False, reward=None, propensity=None, token_ids=(), logprobs=()),
        candidate(
            1,
            chosen=True,
            reward=-3.25,
            propensity=0.125,
            finish_reason=FinishReason.LENGTH,
            stage_rewards=(0.1, -2.5),
            reward_components={"thumbs": -4.0, "short": 0.3},
        ),
        candidate(
            2,
            policy_version=6,
            text="",
            finish_reason=FinishReason.ABORTED,
            stage_rewards=(1.0,),
        ),
    ),
)


@pytest.mark.parametrize("written", [interaction("plain"), UNLIKE], ids=["plain", "unlike"])
def test_every_field_comes_back_as_it_was_written(store: Engine, written: Interaction):
    with store.begin() as connection:
        interactions.append(connection, written)
    with reading(store) as connection:
        read = interactions.get(connection, written.response_id)
    assert read is not None
    assert dataclasses.asdict(read) == dataclasses.asdict(written)


def test_a_reply_without_a_row_is_none(store: Engine):
    with reading(store) as connection:
        assert interactions.get(connection, "never given") is None


def test_a_response_id_is_given_once(store: Engine):
    with store.begin() as connection:
        interactions.append(connection, interaction("one"))
    with pytest.raises(IntegrityError), store.begin() as connection:
        interactions.append(connection, interaction("one"))


def test_a_listing_holds_the_wanted_versions_oldest_first_however_many(store: Engine):
    with store.begin() as connection:
        for i in range(450):  # more than two batches
            interactions.append(connection, interaction(f"r{i:04d}", policy_version=i % 3))
        interactions.append(connection, interaction("other", policy="another", policy_version=9))
    with reading(store) as connection:
        found = interactions.list_since(connection, DEFAULT_POLICY, 1)
    assert [f.response_id for f in found] == [f"r{i:04d}" for i in range(450) if i % 3 >= 1]
    assert all(len(f.candidates) == 2 for f in found)


def test_the_newest_are_read_first_in_batches_and_no_further_than_asked_for(
    store: Engine, decoded: list[str]
):
    with store.begin() as connection:
        for i in range(3 * interactions.BATCH):
            interactions.append(connection, interaction(f"r{i:04d}", candidates=(candidate(),)))
    with reading(store) as connection:
        newest = interactions.newest_since(connection, DEFAULT_POLICY, 0)
        assert [next(newest).response_id for _ in range(2)] == ["r0599", "r0598"]
        assert decoded == [f"r{i:04d}" for i in range(400, 600)]
        assert [i.response_id for i in newest] == [f"r{i:04d}" for i in range(597, -1, -1)]


def test_rollouts_of_the_given_rounds_are_known(store: Engine):
    with store.begin() as connection:
        for i, name in enumerate("abcd"):
            interactions.append(connection, interaction(name, policy_version=i))
        for number, used in ((1, ("a", "b")), (2, ("c",))):
            done = finished_round(number, rollouts=used, version=None)
            versions.finish_round(connection, done, None)
    with reading(store) as connection:
        assert _used(connection, ["round-1"]) == ["a", "b"]
        assert _used(connection, ["round-1", "round-2"]) == ["a", "b", "c"]
        assert _used(connection, ["round-1", "round-2"], min_version=1) == ["b", "c"]
        assert _used(connection, []) == []


def _used(connection: Connection, rounds: list[str], min_version: int = 0) -> list[str]:
    found = interactions.used_as_rollouts(connection, rounds, min_version)
    return [each.response_id for each in found]


def test_erasing_an_interaction_erases_its_candidates(store: Engine):
    with store.begin() as connection:
        interactions.append(connection, interaction("gone"))
        connection.execute(text("DELETE FROM interactions"))
    with reading(store) as connection:
        assert connection.scalar(text("SELECT count(*) FROM candidates")) == 0


def test_a_reply_may_hold_what_no_text_column_takes(store: Engine):
    with store.begin() as connection:
        interactions.append(connection, interaction("r", candidates=(candidate(text="a\0b"),)))
        (stored,) = interactions.load(connection, ["r"])
    assert stored.chosen.text == "a\ufffdb"
