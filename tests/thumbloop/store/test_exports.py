import pytest
from sqlalchemy import Engine

from tests.rows import ANN, BOB, candidate, interaction, rated
from thumbloop.store import erasure, exports, feedback, interactions, preferences
from thumbloop.store.exports import Selection
from thumbloop.types import (
    DEFAULT_POLICY,
    IMPORTED_VERSION,
    Learning,
    Message,
    Prompt,
    Role,
    Status,
)

CHAT = Prompt(messages=(Message(Role.USER, "How was it?"),))
NOT_FOR_LEARNING = [
    {"learning": Learning.EXCLUDED},
    {"status": Status.CANCELLED},
    {"status": Status.FAILED},
]


def ups(store: Engine, which: Selection = exports.EVERYTHING) -> list[tuple[str, bool]]:
    return [(r.said.response_id, r.is_up) for r in exports.rated(store, DEFAULT_POLICY, which)]


def test_the_thumb_that_counts_comes_with_what_it_judges(store: Engine):
    with store.begin() as connection:
        reply, _ = rated(connection, 1, prompt=CHAT)
        feedback.submit_thumb(connection, reply, 0, ANN, comment="no", at=5.0)
        interactions.append(connection, interaction())  # nobody said anything of it
    (found,) = exports.rated(store, DEFAULT_POLICY)
    assert (found.text, found.is_up) == ("reply 0", False)
    assert found.said == (reply, 1, ANN, CHAT, 5.0)


def test_the_last_word_on_two_candidates_comes_with_both(store: Engine):
    with store.begin() as connection:
        reply = interaction(candidates=tuple(candidate(i) for i in range(3)))
        interactions.append(connection, reply)
        preferences.submit_preference(connection, reply.response_id, 0, 1, ANN, at=4.0)
        preferences.submit_preference(connection, reply.response_id, 2, 1, ANN, at=5.0)
        preferences.submit_preference(connection, reply.response_id, 1, 0, ANN, at=6.0)
    first, last = exports.compared(store, DEFAULT_POLICY)
    assert (first.better, first.worse, first.said.at) == ("reply 2", "reply 1", 5.0)
    assert (last.better, last.worse, last.said.at) == ("reply 1", "reply 0", 6.0)
    (rolled,) = exports.rolled(store, DEFAULT_POLICY)
    assert rolled.preferences == ((2, 1), (1, 0))


def test_a_reply_comes_with_all_candidates_and_all_that_was_said_of_it(store: Engine):
    with store.begin() as connection:
        liked, _ = rated(connection, 1)
        silent = interaction()
        interactions.append(connection, silent)
        preferences.submit_preference(connection, liked, 1, 0, ANN, at=4.0)
    first, second = exports.rolled(store, DEFAULT_POLICY)
    assert first.reply.candidates == (candidate(0), candidate(1))
    assert (first.is_up, first.preferences) == (True, ((1, 0),))
    assert (second.reply, second.is_up, second.preferences) == (silent, None, ())


@pytest.mark.parametrize("changes", NOT_FOR_LEARNING)
def test_what_may_not_be_learned_from_does_not_leave(store: Engine, changes: dict[str, object]):
    with store.begin() as connection:
        reply, _ = rated(connection, 1, **changes)
        preferences.submit_preference(connection, reply, 1, 0, ANN, at=4.0)
    assert not list(exports.rated(store, DEFAULT_POLICY))
    assert not list(exports.compared(store, DEFAULT_POLICY))
    assert not list(exports.rolled(store, DEFAULT_POLICY))


def test_a_user_who_is_forgotten_while_it_is_read_is_not_in_what_comes_later(
    store: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exports, "BATCH", 2)
    with store.begin() as connection:
        for user in (ANN, BOB, ANN, BOB, ANN):
            rated(connection, 1, user=user)
    found = exports.rated(store, DEFAULT_POLICY)
    users = [next(found).said.user]
    with store.begin() as connection:
        erasure.erase(connection, DEFAULT_POLICY, BOB, at=1.0, actor="operator")
    users += [each.said.user for each in found]
    assert users == [ANN, BOB, ANN, ANN]  # the second had been read with the first


def test_a_batch_at_a_time_all_come_once_and_in_order(
    store: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exports, "BATCH", 2)
    with store.begin() as connection:
        replies = [rated(connection, i % 2)[0] for i in range(5)]
        for reply in replies:
            preferences.submit_preference(connection, reply, 1, 0, ANN, at=4.0)
    assert ups(store) == [(reply, bool(i % 2)) for i, reply in enumerate(replies)]
    compared = exports.compared(store, DEFAULT_POLICY)
    assert [each.said.response_id for each in compared] == replies
    rolled = exports.rolled(store, DEFAULT_POLICY)
    assert [each.reply.response_id for each in rolled] == replies


def test_a_time_and_a_version_may_be_chosen(store: Engine):
    with store.begin() as connection:
        replies = []
        for at in (10.0, 20.0, 30.0):
            reply = interaction(policy_version=int(at), created_at=at)
            interactions.append(connection, reply)
            feedback.submit_thumb(connection, reply.response_id, 1, ANN, at=at + 5)
            preferences.submit_preference(connection, reply.response_id, 1, 0, ANN, at=at + 6)
            replies.append(reply.response_id)
    assert [reply for reply, _ in ups(store, Selection(since=15.0, until=35.0))] == replies[:2]
    assert [reply for reply, _ in ups(store, Selection(policy_version=20))] == replies[1:2]
    given = exports.rolled(store, DEFAULT_POLICY, Selection(since=10.0, until=30.0))
    assert [each.reply.response_id for each in given] == replies[:2]
    said = exports.compared(store, DEFAULT_POLICY, Selection(since=36.0))
    assert [each.said.response_id for each in said] == replies[2:]


def test_what_was_imported_is_no_rollout(store: Engine):
    with store.begin() as connection:
        imported, _ = rated(connection, 1, policy_version=IMPORTED_VERSION)
    assert ups(store) == [(imported, True)]
    assert not list(exports.rolled(store, DEFAULT_POLICY))
