import sqlite3

import pytest
from sqlalchemy import Connection, Engine, text

from tests.rows import ANN, BOB, finished_round, interaction, rated, version
from thumbloop.errors import FeedbackTooLate, RequestIdTaken, UnknownResponse
from thumbloop.store import feedback, interactions, learned, reading, versions
from thumbloop.types import DEFAULT_POLICY, Arm, Learning, Status, User


@pytest.fixture
def reply(store: Engine) -> str:
    """A reply to Ann."""
    with store.begin() as connection:
        interactions.append(connection, interaction("a-reply", policy_version=3))
    return "a-reply"


def thumb(connection: Connection, reply: str, value: int, **options):
    options = {"user": ANN, "at": 1.0} | options
    return feedback.submit_thumb(connection, reply, value, options.pop("user"), **options)


def effective(connection: Connection) -> list[int]:
    return [r.value for r in feedback.list_rated(connection, DEFAULT_POLICY)]


def test_a_thumb_names_the_version_that_had_answered(store: Engine, reply: str):
    with store.begin() as connection:
        stored = thumb(connection, reply, 1)
    assert (stored.policy_version, stored.value, stored.duplicate) == (3, 1, False)


def test_a_repeated_request_returns_the_first_event_and_changes_nothing(store: Engine, reply: str):
    with store.begin() as connection:
        first = thumb(connection, reply, 1, request_id="q", at=1.0)
        again = thumb(connection, reply, 1, request_id="q", at=9.0)
        assert again.feedback_id == first.feedback_id
        assert again.created_at == 1.0
        assert again.duplicate
        assert feedback.counts(connection) == (1, 1)


def test_a_late_retry_does_not_undo_a_later_thumb(store: Engine, reply: str):
    with store.begin() as connection:
        thumb(connection, reply, 1, request_id="first")
        thumb(connection, reply, 0, request_id="second")
        late = thumb(connection, reply, 1, request_id="first")
        assert late.duplicate
        assert effective(connection) == [0]


def test_a_thumb_for_an_old_reply_is_refused_but_a_repeat_is_none(store: Engine, reply: str):
    given = interaction().created_at
    with store.begin() as connection:
        first = thumb(connection, reply, 1, request_id="q", at=given + 10, window_s=10)
        with pytest.raises(FeedbackTooLate):
            thumb(connection, reply, 0, at=given + 10.5, window_s=10)
        with pytest.raises(UnknownResponse):
            thumb(connection, reply, 0, user=BOB, at=given + 10.5, window_s=10)
        for repeat in ({"request_id": "q"}, {}):
            again = thumb(connection, reply, 1, at=given + 99, window_s=10, **repeat)
            assert (again.duplicate, again.feedback_id) == (True, first.feedback_id)
        assert (effective(connection), feedback.counts(connection)) == ([1], (1, 1))


def test_the_same_thumb_again_counts_once_even_without_a_request_id(store: Engine, reply: str):
    with store.begin() as connection:
        first = thumb(connection, reply, 1)
        again = thumb(connection, reply, 1)
        assert (again.duplicate, again.feedback_id) == (True, first.feedback_id)
        assert feedback.counts(connection) == (1, 1)


def test_a_late_retry_of_a_thumb_that_changed_nothing_does_not_undo_a_later_one(
    store: Engine, reply: str
):
    with store.begin() as connection:
        thumb(connection, reply, 1, request_id="first")
        thumb(connection, reply, 1, request_id="the same again")
        thumb(connection, reply, 0, request_id="changed my mind")
        assert thumb(connection, reply, 1, request_id="the same again").duplicate
        assert effective(connection) == [0]


def test_the_last_thumb_counts_and_all_are_remembered(store: Engine, reply: str):
    with store.begin() as connection:
        ids = [thumb(connection, reply, value).feedback_id for value in (1, 0, 1, 0)]
        assert ids == sorted(set(ids))
        assert effective(connection) == [0]
        assert feedback.counts(connection) == (4, 1)
        history = connection.execute(text("SELECT value FROM feedback ORDER BY id"))
        assert [row.value for row in history] == [1, 0, 1, 0]


def test_a_stranger_hears_what_everybody_hears_of_a_reply_that_never_was(store: Engine, reply: str):
    strangers = (BOB, User("a subject", ANN.user_id), User())
    with store.begin() as connection:
        with pytest.raises(UnknownResponse) as unknown:
            thumb(connection, "never-given", 1)
        for stranger in strangers:
            with pytest.raises(UnknownResponse) as foreign:
                thumb(connection, reply, 1, user=stranger)
            assert str(foreign.value) == str(unknown.value)
        assert feedback.counts(connection) == (0, 0)


def test_a_request_id_that_named_another_thumb_is_refused_and_loses_nothing(
    store: Engine, reply: str
):
    with store.begin() as connection:
        thumb(connection, reply, 1, request_id="q")
        with pytest.raises(RequestIdTaken, match="request_id"):
            thumb(connection, reply, 0, request_id="q")
    with reading(store) as connection:
        assert feedback.counts(connection) == (1, 1)


def test_two_users_may_choose_the_same_request_id(store: Engine, reply: str):
    with store.begin() as connection:
        interactions.append(connection, interaction("bobs", user=BOB))
        thumb(connection, reply, 1, request_id="q")
        assert not thumb(connection, "bobs", 0, user=BOB, request_id="q").duplicate
        assert feedback.counts(connection) == (2, 2)


def test_an_effective_thumb_comes_with_the_reply_that_was_shown(store: Engine):
    with store.begin() as connection:
        response_id, feedback_id = rated(
            connection,
            0,
            arm=Arm.AUDIT,
            learning=Learning.EXCLUDED,
            status=Status.CANCELLED,
            policy_version=2,
        )
        (found,) = feedback.list_rated(connection, DEFAULT_POLICY)
        stored = interactions.get(connection, response_id)
    assert stored is not None
    assert found.candidate == stored.chosen
    assert found.prompt_token_ids == stored.prompt_token_ids
    assert (found.response_id, found.feedback_id, found.value) == (response_id, feedback_id, 0)
    assert (found.arm, found.learning, found.status) == (
        Arm.AUDIT,
        Learning.EXCLUDED,
        Status.CANCELLED,
    )
    assert found.user == ANN
    assert found.is_new


def test_another_policys_thumbs_are_not_listed(store: Engine):
    with store.begin() as connection:
        rated(connection, policy="another")
        assert feedback.list_rated(connection, DEFAULT_POLICY) == []


def test_feedback_is_new_until_a_round_among_the_ancestors_used_it(store: Engine):
    with store.begin() as connection:
        ids = [rated(connection)[1] for _ in range(3)]
        _learn(connection, 1, 0, new=ids[:1])
        _learn(connection, 2, 1, new=ids[1:2], replayed=ids[:1])
        assert _new(connection, of=0) == ids
        assert _new(connection, of=1) == ids[1:]
        assert _new(connection, of=2) == ids[2:]


def test_a_rollback_gives_feedback_back(store: Engine):
    """Version 2 was taken back, version 3 grows from 1: what only 2 had learned is new again."""
    with store.begin() as connection:
        ids = [rated(connection)[1] for _ in range(3)]
        _learn(connection, 1, 0, new=ids[:1])
        _learn(connection, 2, 1, new=ids[1:2])
        _learn(connection, 3, 1, new=ids[2:])
        assert _new(connection, of=3) == ids[1:2]


def test_a_changed_thumb_is_new_again(store: Engine):
    with store.begin() as connection:
        response_id, feedback_id = rated(connection, 1)
        _learn(connection, 1, 0, new=[feedback_id])
        assert _new(connection, of=1) == []
        changed = thumb(connection, response_id, 0)
        assert _new(connection, of=1) == [changed.feedback_id]


def test_what_was_learned_is_not_new_again_for_a_comment_or_a_change_of_mind_and_back(
    store: Engine,
):
    with store.begin() as connection:
        response_id, feedback_id = rated(connection, 1)
        _learn(connection, 1, 0, new=[feedback_id])
        commented = thumb(connection, response_id, 1, comment="lovely")
        assert not commented.duplicate
        assert feedback.counts(connection) == (2, 1)
        assert _new(connection, of=1) == []
        thumb(connection, response_id, 0)
        thumb(connection, response_id, 1)
        assert effective(connection) == [1]
        assert _new(connection, of=1) == []
        assert _count_new(connection, of=1) == 0


def test_a_reply_whose_thumb_was_learned_is_known_whatever_is_thought_of_it_now(store: Engine):
    with store.begin() as connection:
        response_id, feedback_id = rated(connection, 1)
        rated(connection, 1)
        _learn(connection, 1, 0, new=[feedback_id])
        thumb(connection, response_id, 0)
        rounds = versions.learned_by(connection, DEFAULT_POLICY, 1)
        listed = feedback.list_rated(connection, DEFAULT_POLICY, rounds)
        assert [r.is_new for r in listed] == [True, True]
        assert learned.learned_replies(connection, rounds) == {response_id}
        assert _count_new(connection, of=1) == 2


def test_only_new_feedback_on_replies_that_may_be_learned_from_is_counted(store: Engine):
    with store.begin() as connection:
        ids = [rated(connection)[1] for _ in range(3)]
        rated(connection, learning=Learning.EXCLUDED)
        rated(connection, status=Status.CANCELLED)
        rated(connection, policy="another")
        _learn(connection, 1, 0, new=ids[:1])
        left_out = {"learning_excluded": 1, "cancelled": 1}
        assert feedback.count_new(connection, DEFAULT_POLICY, [])[:2] == (3, left_out)
        rounds = versions.learned_by(connection, DEFAULT_POLICY, 1)
        assert feedback.count_new(connection, DEFAULT_POLICY, rounds)[:2] == (2, left_out)


def test_of_what_was_learned_only_the_newest_is_read_and_what_is_new_always(
    store: Engine, decoded: list[str]
):
    with store.begin() as connection:
        ids = [rated(connection)[1] for _ in range(6)]
        _learn(connection, 1, 0, new=ids[1:5])
        rounds = versions.learned_by(connection, DEFAULT_POLICY, 1)
        listed = feedback.list_rated(connection, DEFAULT_POLICY, rounds, 2)
        assert [r.feedback_id for r in listed] == [ids[0], *ids[3:]]
        assert [r.is_new for r in listed] == [True, False, False, True]
        assert feedback.count(connection, DEFAULT_POLICY) == 6
    assert len(decoded) == 4


def test_new_feedback_that_is_too_old_is_counted_apart(store: Engine, reply: str):
    with store.begin() as connection:
        thumb(connection, reply, 1, at=5.0)
        excluded = interaction(learning=Learning.EXCLUDED)
        interactions.append(connection, excluded)
        thumb(connection, excluded.response_id, 1, at=5.0)
        rated(connection)
        left_out = {"learning_excluded": 1}
        count = feedback.count_new(connection, DEFAULT_POLICY, [], 5.0)
        assert count[:2] == (2, left_out)
        late = feedback.count_new(connection, DEFAULT_POLICY, [], 5.5)
        assert late[:2] == (1, left_out | {"too_old": 1})


def test_new_and_older_feedback_is_counted_by_user(store: Engine):
    with store.begin() as connection:
        of_ann = [rated(connection, user=ANN)[1] for _ in range(4)]
        rated(connection, user=BOB)
        rated(connection, user=BOB, learning=Learning.EXCLUDED)
        _learn(connection, 1, 0, new=of_ann[:3])
        rounds = versions.learned_by(connection, DEFAULT_POLICY, 1)
        found = feedback.count_new(connection, DEFAULT_POLICY, rounds)
        assert (found.new_of, found.older_of) == ({ANN: 1, BOB: 1}, {ANN: 3})
        fewer = feedback.count_new(connection, DEFAULT_POLICY, rounds, max_older=2)
        assert (fewer.new_of, fewer.older_of) == ({ANN: 1, BOB: 1}, {ANN: 2})
        both = found.plus(fewer)
        assert (both.usable, both.new_of, both.older_of) == (4, {ANN: 2, BOB: 2}, {ANN: 5})


@pytest.mark.sqlite
def test_a_line_of_versions_may_be_longer_than_a_query_may_have_parameters(store: Engine):
    """Databases take some ten thousand, which a year of versions exceeds: here they take a hundred."""
    many = range(2, 400)
    with store.begin() as connection:
        _, feedback_id = rated(connection, 1)
        rated(connection, 1)
        _learn(connection, 1, 0, new=[feedback_id])
        for number in many:
            _learn(connection, number, number - 1, new=[])
        driver = connection.connection.driver_connection
        driver.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 100)
        behind = versions.rounds_behind(DEFAULT_POLICY, many[-1])
        assert len(versions.learned_by(connection, DEFAULT_POLICY, many[-1])) == len(many) + 1
        assert feedback.count_new(connection, DEFAULT_POLICY, behind).usable == 1
        assert [r.is_new for r in feedback.list_rated(connection, DEFAULT_POLICY, behind)] == [
            False,
            True,
        ]
        assert learned.learned_replies(connection, behind)
        assert interactions.used_as_rollouts(connection, behind, 0) == []


def test_nothing_is_new_in_an_empty_store(store: Engine):
    with reading(store) as connection:
        assert feedback.list_rated(connection, DEFAULT_POLICY) == []
        assert feedback.count_new(connection, DEFAULT_POLICY, [])[:2] == (0, {})
        assert feedback.counts(connection) == (0, 0)


def _learn(connection: Connection, number: int, parent: int, *, new, replayed=()) -> None:
    done = finished_round(
        number, parent, new_feedback=tuple(new), replayed_feedback=tuple(replayed)
    )
    versions.finish_round(connection, done, version(number, parent))


def _count_new(connection: Connection, *, of: int) -> int:
    rounds = versions.learned_by(connection, DEFAULT_POLICY, of)
    return feedback.count_new(connection, DEFAULT_POLICY, rounds).usable


def _new(connection: Connection, *, of: int) -> list[int]:
    rounds = versions.learned_by(connection, DEFAULT_POLICY, of)
    listed = feedback.list_rated(connection, DEFAULT_POLICY, rounds)
    return [r.feedback_id for r in listed if r.is_new]
