import asyncio
import random
import time

import pytest

from demo.evaluation import Evaluation
from demo.ledger import Ledger, Served
from demo.loop import MARKER, _follow, empty
from demo.report import Run, Stored, make_report
from demo.settings import Options
from demo.swaps import watch_swaps
from demo.users import Crowd, Users
from thumbloop.config import State
from thumbloop.errors import SettingsError
from thumbloop.processes import ProcessFailed
from thumbloop.store import open_store
from thumbloop.types import PolicyVersion, VersionState
from thumbloop.v1 import feedback_pb2, policy_pb2


def test_a_folder_that_no_demo_wrote_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="holds no run of the demo"):
        empty(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_earlier_run_is_replaced(tmp_path):
    empty(tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text("{}")
    empty(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [MARKER]


class FakeClient:
    """Answers at once; every reply is its number."""

    def __init__(self, until=50):
        self.thumbs = {}
        self.asked = 0
        self.until = until
        self.has_asked_enough = asyncio.Event()

    async def generate(self, prompt, *, user_id):
        self.asked += 1
        if self.asked >= self.until:
            self.has_asked_enough.set()
        return policy_pb2.GenerateResponse(response_id=str(self.asked), text=str(self.asked))

    async def rate(self, response_id, *, up, user_id, request_id):
        self.thumbs[response_id] = up
        return feedback_pb2.SubmitFeedbackResponse()


async def crowd_of(client, preference, *, shuffled, ledger=None):
    crowd = Crowd(requests_per_s=5000, rating_share=1.0, noise=0.0)
    users = Users(client, ["?"], preference, crowd, ledger or Ledger(), seed=0, shuffled=shuffled)
    visiting = asyncio.create_task(users.visit())
    enough = asyncio.create_task(client.has_asked_enough.wait())
    await asyncio.wait((visiting, enough), return_when=asyncio.FIRST_COMPLETED)
    enough.cancel()
    visiting.cancel()
    await users.leave()
    return visiting


async def test_users_like_what_they_prefer():
    client, ledger = FakeClient(), Ledger()
    await crowd_of(client, lambda _, r: float(int(r) % 2), shuffled=False, ledger=ledger)
    assert client.thumbs == {r: bool(int(r) % 2) for r in client.thumbs}
    assert ledger.sent == len(ledger.acknowledged) == len(client.thumbs) >= 50


async def test_the_control_keeps_the_number_of_thumbs_up_and_moves_them():
    def is_liked(_prompt: str, reply: str) -> float:
        return float(random.Random(reply).random() < 0.5)

    client = FakeClient(until=400)
    await crowd_of(client, is_liked, shuffled=True)
    given = client.thumbs
    right = sum(up == bool(is_liked("", r)) for r, up in given.items())
    assert sum(given.values()) == sum(is_liked("", r) for r in given)
    assert len(given) % Crowd().shuffle_block == 0
    assert 0.35 < right / len(given) < 0.65


async def test_a_preference_that_raises_ends_the_demo_with_its_error():
    def broken(_prompt, _reply):
        raise ZeroDivisionError("a bug in the preference")

    visiting = await crowd_of(FakeClient(), broken, shuffled=False)
    with pytest.raises(ZeroDivisionError):
        await visiting


def test_the_report_counts_lost_and_duplicated_thumbs():
    ledger = Ledger(served=[Served("a", 0, 1.0, 1.0)], sent=2)
    ledger.acknowledged["a"] = (2.0, 1)
    ledger.acknowledged["b"] = (2.0, 0)
    base = PolicyVersion("default", 0, None, "", "", "", "", 0.0, state=VersionState.CURRENT)
    stored = Stored([base], [], [], feedback_events=1, rounds=[], learned_from={})
    run = Run("praise", 0, shuffled=False, ledger=ledger, started_at=time.time())
    counted = make_report(run, stored, time.time())["feedback"]
    assert (counted["sent"], counted["lost"], counted["duplicated"]) == (2, 2, 1)


async def test_a_swap_is_timed_by_somebody_who_asks_all_the_time():
    answering, asked = [0, 0, 1], []

    class Swapping:
        async def generate(self, prompt, *, user_id, options):
            asked.append(options)
            version = answering.pop(0) if answering else 1
            return policy_pb2.GenerateResponse(response_id=str(len(asked)), policy_version=version)

    ledger = Ledger(first_answers={0: 1.0})
    newest = PolicyVersion("default", 1, 0, "", "", "", "", 5.0)
    began = time.time()
    watching = asyncio.create_task(watch_swaps(Swapping(), "?", ledger, lambda: newest))
    while 1 not in ledger.first_answers:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    watching.cancel()
    assert ledger.first_answers[0] == 1.0
    assert began <= ledger.first_answers[1] <= time.time()
    assert len(asked) == 3
    assert all(options.is_excluded for options in asked)
    assert ledger.evaluated == {"1", "2", "3"}


class Examiner:
    """Takes its time, as with a slow model."""

    async def policy(self, version):
        await asyncio.sleep(0.7)
        return Evaluation(0.5, (0.4, 0.6), 20.0, None)


class Running:
    """A process that runs until it is stopped."""

    def __init__(self) -> None:
        self.is_stopped = False

    def check(self) -> None:
        if self.is_stopped:
            raise ProcessFailed("it has ended")

    def stop(self) -> None:
        self.is_stopped = True


@pytest.mark.parametrize(("rounds", "minutes"), [(3, 0.5), (1000, 0.02)])
async def test_a_trainer_that_outruns_the_examiner_is_stopped_once_there_is_enough(
    tmp_path, monkeypatch, rounds, minutes
):
    trainer, looks = Running(), [0]

    def rows(*_arguments):
        looks[0] += not trainer.is_stopped  # another version whenever somebody looks
        return [{"policy_version": looks[0], "state": "current"}]

    monkeypatch.setattr("demo.loop.version_rows", rows)
    monkeypatch.setattr(Ledger, "first_reply_at", lambda _ledger, _version: 1.0)
    run = Run("praise", 0, shuffled=False, ledger=Ledger(), started_at=time.time())
    options = Options("praise", 0, rounds, False, None, tmp_path, max_minutes=minutes)
    database = open_store(State(folder=tmp_path / "state"))
    await _follow(options, run, Examiner(), database, Running(), trainer, lambda *_: None)
    assert trainer.is_stopped
    assert max(run.evaluations) == looks[0]
    assert (looks[0] == rounds) is (rounds == 3)
    database.dispose()


@pytest.mark.parametrize("is_answered", [True, False])
async def test_when_time_is_up_an_examination_that_goes_on_is_waited_for(tmp_path, is_answered):
    ledger = Ledger(served=[Served("a", 0, 1.0, 1.0)] if is_answered else [])
    run = Run("praise", 0, shuffled=False, ledger=ledger, started_at=time.time())
    options = Options("praise", 0, 3, False, None, tmp_path, max_minutes=0.005)
    database = open_store(State(folder=tmp_path / "state"))
    processes = Running(), Running()
    follow = _follow(options, run, Examiner(), database, *processes, lambda *_: None)
    if is_answered:
        await follow
        assert run.evaluations[0].thumb_up_rate == 0.5
    else:
        with pytest.raises(ProcessFailed, match=r"in 0\.005 minutes \(0 replies were served\)"):
            await follow
    database.dispose()
