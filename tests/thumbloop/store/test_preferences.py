import pytest
from sqlalchemy import Connection, Engine

from tests.rows import ANN, BOB, candidate, finished_round, interaction, version
from thumbloop.errors import FeedbackTooLate, InvalidRequest, RequestIdTaken, UnknownResponse
from thumbloop.store import interactions, preferences, versions
from thumbloop.store.learned import learned_replies
from thumbloop.types import DEFAULT_POLICY, FinishReason, Learning, Status


@pytest.fixture
def reply(store: Engine) -> str:
    """A reply to Ann of three candidates and a fourth that was aborted."""
    four = (*(candidate(i) for i in range(3)), candidate(3, finish_reason=FinishReason.ABORTED))
    with store.begin() as connection:
        interactions.append(connection, interaction("a-reply", policy_version=3, candidates=four))
    return "a-reply"


def prefer(connection: Connection, reply: str, better: int, worse: int, **options):
    options = {"user": ANN, "at": 1.0} | options
    user = options.pop("user")
    return preferences.submit_preference(connection, reply, better, worse, user, **options)


def effective(connection: Connection, learned_by=()) -> list[tuple[int, int]]:
    compared = preferences.list_compared(connection, DEFAULT_POLICY, learned_by)
    return [(c.better.index, c.worse.index) for c in compared]


def test_a_preference_comes_back_with_both_candidates(store: Engine, reply: str):
    with store.begin() as connection:
        stored = prefer(connection, reply, 2, 0, at=5.0)
        (compared,) = preferences.list_compared(connection, DEFAULT_POLICY)
    assert (stored.preference_id, stored.policy_version, stored.duplicate) == (1, 3, False)
    assert (compared.better.text, compared.worse.text) == ("reply 2", "reply 0")
    assert (compared.user, compared.created_at, compared.is_new) == (ANN, 5.0, True)
    assert compared.prompt_token_ids == (7, 8, 9)


def test_the_last_word_on_two_candidates_counts(store: Engine, reply: str):
    with store.begin() as connection:
        for better, worse in ((0, 1), (1, 0), (2, 1)):
            prefer(connection, reply, better, worse)
        assert effective(connection) == [(1, 0), (2, 1)]


def test_a_preference_for_an_old_reply_is_refused_but_a_repeat_is_none(store: Engine, reply: str):
    given = interaction().created_at
    with store.begin() as connection:
        prefer(connection, reply, 2, 0, at=given + 10, window_s=10)
        with pytest.raises(FeedbackTooLate):
            prefer(connection, reply, 0, 2, at=given + 10.5, window_s=10)
        assert prefer(connection, reply, 2, 0, at=given + 10.5, window_s=10).duplicate
        assert effective(connection) == [(2, 0)]


def test_saying_the_same_again_changes_nothing(store: Engine, reply: str):
    with store.begin() as connection:
        first = prefer(connection, reply, 0, 1)
        again = prefer(connection, reply, 0, 1, at=9.0)
        assert (again.preference_id, again.created_at, again.duplicate) == (
            first.preference_id,
            1.0,
            True,
        )
        assert not prefer(connection, reply, 0, 2).duplicate


def test_a_repeated_request_is_stored_once_and_its_id_is_taken(store: Engine, reply: str):
    with store.begin() as connection:
        first = prefer(connection, reply, 0, 1, request_id="q")
        prefer(connection, reply, 1, 0, request_id="r")
        again = prefer(connection, reply, 0, 1, request_id="q")
        assert again.preference_id == first.preference_id
        assert again.duplicate
        assert effective(connection) == [(1, 0)]
        with pytest.raises(RequestIdTaken, match="request_id"):
            prefer(connection, reply, 2, 0, request_id="q")


def test_only_who_was_answered_may_compare(store: Engine, reply: str):
    with store.begin() as connection:
        with pytest.raises(UnknownResponse) as foreign:
            prefer(connection, reply, 0, 1, user=BOB)
        with pytest.raises(UnknownResponse) as unknown:
            prefer(connection, "no reply", 0, 1)
        assert str(foreign.value) == str(unknown.value)
        assert effective(connection) == []


@pytest.mark.parametrize(
    ("better", "worse", "field"),
    [(4, 0, "better_index"), (0, 9, "worse_index"), (0, 3, "worse_index")],
)
def test_only_candidates_that_were_read_to_their_end_are_compared(
    store: Engine, reply: str, better: int, worse: int, field: str
):
    with store.begin() as connection:
        with pytest.raises(InvalidRequest, match=field):
            prefer(connection, reply, better, worse)
        assert effective(connection) == []


def test_preferences_are_new_until_learned_from_and_after_a_change_of_mind(
    store: Engine, reply: str
):
    with store.begin() as connection:
        learned = prefer(connection, reply, 0, 1)
        prefer(connection, reply, 0, 2)
        done = finished_round(4, 3, new_preferences=(learned.preference_id,))
        versions.finish_round(connection, done, version(4, 3))
        compared = preferences.list_compared(connection, DEFAULT_POLICY, ["round-4"])
        assert [c.is_new for c in compared] == [False, True]
        assert preferences.count_new(connection, DEFAULT_POLICY, ["round-4"])[:2] == (1, {})
        prefer(connection, reply, 1, 0)
        *_, changed = preferences.list_compared(connection, DEFAULT_POLICY, ["round-4"])
        assert changed.is_new
        assert learned_replies(connection, ["round-4"]) == {reply}
        assert preferences.count_new(connection, DEFAULT_POLICY, ["round-4"])[:2] == (2, {})
        assert preferences.count_new(connection, DEFAULT_POLICY, [])[:2] == (2, {})


def test_of_what_was_learned_only_the_newest_is_read_and_what_is_new_always(
    store: Engine, decoded: list[str]
):
    with store.begin() as connection:
        replies = [interaction() for _ in range(6)]
        for reply in replies:
            interactions.append(connection, reply)
        said = [prefer(connection, reply.response_id, 0, 1).preference_id for reply in replies]
        done = finished_round(4, 3, new_preferences=tuple(said[1:5]))
        versions.finish_round(connection, done, version(4, 3))
        compared = preferences.list_compared(connection, DEFAULT_POLICY, ["round-4"], 2)
        assert [c.preference_id for c in compared] == [said[0], *said[3:]]
        assert [c.is_new for c in compared] == [True, False, False, True]
        assert preferences.count(connection, DEFAULT_POLICY) == 6
    assert len(set(decoded)) == 4


def test_new_preferences_that_are_too_old_are_counted_apart(store: Engine, reply: str):
    with store.begin() as connection:
        prefer(connection, reply, 0, 1, at=5.0)
        prefer(connection, reply, 0, 2, at=6.0)
        assert preferences.count_new(connection, DEFAULT_POLICY, [], 5.0)[:2] == (2, {})
        assert preferences.count_new(connection, DEFAULT_POLICY, [], 5.5)[:2] == (1, {"too_old": 1})


def test_new_and_older_preferences_are_counted_by_user(store: Engine, reply: str):
    with store.begin() as connection:
        learned = prefer(connection, reply, 0, 1)
        prefer(connection, reply, 0, 2)
        done = finished_round(4, 3, new_preferences=(learned.preference_id,))
        versions.finish_round(connection, done, version(4, 3))
        found = preferences.count_new(connection, DEFAULT_POLICY, ["round-4"])
        assert (found.new_of, found.older_of) == ({ANN: 1}, {ANN: 1})


def test_replies_that_may_not_be_learned_from_count_as_nothing_new(store: Engine):
    with store.begin() as connection:
        for change in ({"learning": Learning.EXCLUDED}, {"status": Status.CANCELLED}):
            reply = interaction(**change)
            interactions.append(connection, reply)
            prefer(connection, reply.response_id, 0, 1)
        assert preferences.count_new(connection, DEFAULT_POLICY, [])[:2] == (
            0,
            {"learning_excluded": 1, "cancelled": 1},
        )
        assert len(effective(connection)) == 2
