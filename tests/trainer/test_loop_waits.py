"""When a round is due, and when the trainer waits, rests, or tries again."""

import pytest
from sqlalchemy import select

from tests.bench import ONE_ROUND, Bench
from thumbloop.config.trainer import Gate
from thumbloop.errors import StoreUnavailable
from thumbloop.store import interactions, preferences
from thumbloop.types import VersionState
from trainer import dataset
from trainer.loop import LONGEST_REST_S, RESTS_PER_LOOK


def test_an_empty_store_waits_and_says_so_once(bench):
    assert not bench.loop.step()
    assert not bench.loop.step()
    assert bench.lines == ["waiting for 32 new thumbs; version 0 is current"]


def test_the_next_round_waits_for_the_server_to_decide(bench):
    bench.rate(40)
    bench.loop.step()
    bench.rate(40)
    assert not bench.loop.step()
    assert bench.lines[-1] == "waiting for the server to try version 1"


def test_random_thumbs_publish_nothing_and_are_given_back(bench):
    bench.rate(40, shuffled=True)
    assert bench.loop.step()
    assert bench.versions() == [0]
    (row,) = bench.rounds()
    assert row["version"] is None
    assert row["reason"].startswith("auroc: ")
    assert bench.new_feedback(0) == 40


def test_a_blocked_round_does_not_spin(bench):
    bench.rate(40, shuffled=True)
    bench.loop.step()
    assert not bench.loop.step()
    bench.rate(15, shuffled=True)
    assert not bench.loop.step()
    bench.rate(1, shuffled=True)
    assert bench.loop.step()
    assert len(bench.rounds()) == 2


def test_a_blocked_round_of_one_busy_user_does_not_spin(tmp_path, tiny_model):
    bench = Bench(tmp_path, tiny_model)
    bench.config = bench.config.model_copy(
        update={"round": bench.config.round.model_copy(update={"max_user_feedback": 1})}
    )
    bench.loop = bench.new_loop()
    bench.rate(60, shuffled=True)
    assert bench.loop.step()
    (row,) = bench.rounds()
    assert row["metrics"]["feedback_used"] <= 20 < row["metrics"]["feedback_new"] == 60
    assert not bench.loop.step()
    bench.rate(16, shuffled=True)
    assert bench.loop.step()
    bench.engine.dispose()


def test_feedback_that_is_too_old_starts_no_round(tmp_path, tiny_model, monkeypatch):
    bench = Bench(tmp_path, tiny_model)
    bench.config = bench.config.model_copy(
        update={"round": bench.config.round.model_copy(update={"max_feedback_age_s": 3600.0})}
    )
    bench.loop = bench.new_loop()
    bench.rate(40)  # at the beginning of 1970
    with bench.engine.begin() as connection:
        (response_id, *_) = connection.scalars(select(interactions.interactions.c.response_id))
        user = interactions.get(connection, response_id).user
        preferences.submit_preference(connection, response_id, 1, 0, user, at=1.0)
    monkeypatch.setattr(dataset, "read", None)  # what nothing can be learned from is only counted
    assert not bench.loop.step()
    assert bench.lines[-1].endswith("there are 0, left out {'too_old': 41}")
    assert bench.rounds() == []
    bench.engine.dispose()


def test_a_flood_makes_no_round_due(tmp_path, tiny_model):
    bench = Bench(tmp_path, tiny_model, gate=Gate(enabled=False))
    settings = bench.config.round.model_copy(update={"max_user_factor": 2.0})
    bench.config = bench.config.model_copy(update={"round": settings})
    bench.loop = bench.new_loop()
    bench.rate(20)
    bench.rate(200, user="loud")
    assert not bench.loop.step()
    assert "left out {'over_user_factor': " in bench.lines[-1]
    assert bench.rounds() == []
    bench.rate(20)
    assert bench.loop.step()
    bench.engine.dispose()


def test_a_rejected_version_does_not_spin_either(bench):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1, VersionState.REJECTED)
    assert not bench.loop.step()
    bench.rate(16)
    assert bench.loop.step()
    assert bench.get(2).parent == 0


def test_too_few_candidates_wait_and_say_why(bench):
    bench.rate(32, version=0)
    with bench.engine.begin() as connection:
        connection.execute(interactions.interactions.update().values(trainable=False))
    assert not bench.loop.step()
    assert "candidate: 64 came in, left out {'untrainable': 64}" in bench.lines[-1]
    assert bench.rounds() == []


def test_feedback_that_nothing_may_be_learned_from_waits_and_says_so(bench):
    bench.rate(40)
    with bench.engine.begin() as connection:
        connection.execute(interactions.interactions.update().values(learning="excluded"))
    assert not bench.loop.step()
    assert bench.lines[-1].endswith("there are 0, left out {'learning_excluded': 40}")
    said = list(bench.lines)
    bench.rate(1)
    assert not bench.loop.step()
    assert bench.lines == said  # a count that goes on is nothing new
    assert bench.rounds() == []


def test_a_store_that_does_not_answer_is_waited_for(bench, monkeypatch):
    answers = iter([StoreUnavailable("the store cannot be read: locked"), True])

    def step():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(bench.loop, "step", step)
    monkeypatch.setattr(bench.loop, "_config", ONE_ROUND)
    bench.loop.run()
    assert any("locked" in line for line in bench.lines)


def test_it_rests_from_the_whole_round_once_the_version_is_published(bench, monkeypatch):
    published: list[int] = []
    monkeypatch.setattr(
        bench.loop._trunk.pace, "rest", lambda: published.append(len(bench.versions()) - 1)
    )
    bench.rate(40)
    assert bench.loop.step()
    assert (published[0], published[-1]) == (0, 1)


@pytest.mark.parametrize(
    ("look_s", "rest_s"), [(2.0, RESTS_PER_LOOK * 2.0), (600.0, LONGEST_REST_S)]
)
def test_a_long_look_into_the_store_is_followed_by_a_longer_rest_up_to_a_limit(
    bench, monkeypatch, look_s, rest_s
):
    now, rests = [0.0], []
    monkeypatch.setattr("trainer.loop.perf_counter", lambda: now[0])

    def look() -> None:
        now[0] += look_s

    class Enough(Exception):
        pass

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 3:
            raise Enough

    monkeypatch.setattr(bench.loop, "_due", look)
    monkeypatch.setattr("trainer.loop.sleep", rest)
    with pytest.raises(Enough):
        bench.loop.run()
    assert rests == [rest_s] * 3


@pytest.mark.parametrize("where", ["_due", "_round"])
def test_what_took_long_and_failed_is_tried_again_when_it_was_said(bench, monkeypatch, where):
    """Only looks that found nothing due are followed by long rests."""
    now, rests = [0.0], []
    monkeypatch.setattr("trainer.loop.perf_counter", lambda: now[0])
    bench.rate(40)

    class Enough(Exception):
        pass

    def fail(*_of) -> None:
        if len(rests) >= 2:
            raise Enough
        now[0] += 1000.0
        raise StoreUnavailable("no")

    monkeypatch.setattr(bench.loop, where, fail)
    monkeypatch.setattr("trainer.loop.sleep", rests.append)
    with pytest.raises(Enough):
        bench.loop.run()
    assert max(rests) <= bench.config.round.retry_interval_s
