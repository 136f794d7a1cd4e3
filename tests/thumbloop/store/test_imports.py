from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from tests.rows import ANN, BOB, candidate, interaction
from thumbloop.errors import RequestIdTaken
from thumbloop.store import (
    deployments,
    erasure,
    feedback,
    imports,
    interactions,
    preferences,
    reading,
    trials,
)
from thumbloop.store.imports import Brought, Import, Outcome
from thumbloop.types import DEFAULT_POLICY, IMPORTED_VERSION, Interaction, RatedReply


def reply(number: int = 1, **changes: Any) -> Interaction:
    """Return a reply that was imported, as the server makes it."""
    values: dict[str, Any] = {
        "policy_version": IMPORTED_VERSION,
        "request_id": f"imported-{number}",
        "request_digest": f"digest {number}",
        "session_id": "",
        "trainable": False,
        "untrainable_reason": "imported",
        "created_at": 1000.0 + number,
        "candidates": tuple(
            candidate(i, policy_version=IMPORTED_VERSION, logprobs=(), propensity=None, reward=None)
            for i in (0, 1)
        ),
    }
    return interaction(**(values | changes))


def bring_in(connection: Connection, *items: Import) -> list[Brought]:
    return imports.bring_in(connection, DEFAULT_POLICY, items, at=2000.0, actor="ops")


def rated(store: Engine) -> list[RatedReply]:
    with reading(store) as connection:
        return feedback.list_rated(connection, DEFAULT_POLICY)


def test_a_thumb_and_a_preference_are_stored_with_the_time_they_were_given(store: Engine):
    up, pair = reply(1), reply(2, user=BOB)
    with store.begin() as connection:
        done = bring_in(connection, Import(up, 1, "lovely"), Import(pair, None))
    assert done == [
        (Outcome.IMPORTED, up.response_id),
        (Outcome.IMPORTED, pair.response_id),
    ]
    (thumb,) = rated(store)
    assert (thumb.value, thumb.created_at, thumb.user) == (1, 1001.0, ANN)
    with reading(store) as connection:
        (compared,) = preferences.list_compared(connection, DEFAULT_POLICY)
        (event,) = deployments.list_events(connection, DEFAULT_POLICY)
    assert (compared.better.index, compared.worse.index, compared.user) == (0, 1, BOB)
    assert (event["kind"], event["actor"]) == ("imported", "ops")
    assert event["detail"] == {"reason": "", "thumbs": 1, "preferences": 1}


def test_the_same_again_adds_nothing_not_even_an_event(store: Engine):
    with store.begin() as connection:
        (first,) = bring_in(connection, Import(reply(), 1))
        again = bring_in(connection, Import(reply(), 1), Import(reply(), 1))
        assert len(deployments.list_events(connection, DEFAULT_POLICY)) == 1
    assert again == [(Outcome.DUPLICATE, first.response_id)] * 2
    assert len(rated(store)) == 1


def test_under_the_same_name_something_else_is_refused(store: Engine):
    with store.begin() as connection:
        bring_in(connection, Import(reply(), 1))
        (other,) = bring_in(connection, Import(reply(request_digest="another"), 0))
    assert other == (Outcome.REFUSED, "")
    assert [each.value for each in rated(store)] == [1]


def test_the_same_of_another_user_is_not_the_same(store: Engine):
    with store.begin() as connection:
        done = bring_in(connection, Import(reply(), 1), Import(reply(user=BOB), 1))
    assert [each.outcome for each in done] == [Outcome.IMPORTED] * 2


def test_a_reply_that_left_this_store_is_there_already(store: Engine):
    own = interaction()
    with store.begin() as connection:
        interactions.append(connection, own)
        (done,) = bring_in(connection, Import(reply(), 1, source_id=own.response_id))
    assert done == (Outcome.DUPLICATE, own.response_id)
    assert rated(store) == []


def test_another_server_that_is_faster_leaves_nothing_half_done(
    store: Engine, monkeypatch: pytest.MonkeyPatch
):
    with store.begin() as connection:
        bring_in(connection, Import(reply(2), 1))
    monkeypatch.setattr(interactions, "find_id", lambda *_: None)  # it looked before
    with pytest.raises(RequestIdTaken), store.begin() as connection:
        bring_in(connection, Import(reply(1), 1), Import(reply(2), 1))
    assert len(rated(store)) == 1


def test_who_is_forgotten_goes_with_what_was_imported_and_may_be_brought_in_again(store: Engine):
    with store.begin() as connection:
        bring_in(connection, Import(reply(), 1))
        gone = erasure.erase(connection, DEFAULT_POLICY, ANN, at=3000.0, actor="ops")
        assert (gone.interactions, gone.feedback) == (1, 1)
        (again,) = bring_in(connection, Import(reply(), 1))
    assert again.outcome is Outcome.IMPORTED


def test_no_trial_counts_what_was_imported_whichever_versions_it_compares(store: Engine):
    now = replace(reply(), created_at=5000.0)
    with store.begin() as connection:
        bring_in(connection, Import(now, 1))
        sides = [0, 1]
        assert trials.first_thumbs(connection, DEFAULT_POLICY, sides, 0.0) == []
        assert trials.first_replies(connection, DEFAULT_POLICY, sides, 0.0) == []
        assert trials.typical(connection, DEFAULT_POLICY, 0) == (None, None)
