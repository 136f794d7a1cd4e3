"""Users who push a phrase: who they are, what they say, and what a trial makes of it."""

from pathlib import Path

import pytest

from experiments import attack
from experiments.arms import Arm
from experiments.run import Run
from experiments.serving import Attack, Setting
from server.trial import Verdict
from tests.experiments.test_run import TRAINER
from tests.tiny_model import build_tiny_model
from thumbloop.store import feedback, reading, versions
from thumbloop.types import DEFAULT_POLICY

ATTACKERS = {f"user-{i:03d}" for i in range(3)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def test_attackers_push_the_trigger_and_one_of_them_gives_half_of_all_thumbs(model: Path):
    setting = Setting(max_tokens=8, num_candidates=2, attack=Attack("e"))
    with Run(setting, trainer=TRAINER, model=model) as run:
        run.service.serve(600, run.take())
        with reading(run.store) as connection:
            rated = feedback.list_rated(connection, DEFAULT_POLICY)
        honest = run.service.honest_thumbs
    given = [r.user.user_id for r in rated]
    assert given.count("user-000") / len(given) == pytest.approx(0.5, abs=0.06)
    assert honest == sum(user not in ATTACKERS for user in given)
    assert {user for user in given if given.count(user) >= 10} <= ATTACKERS
    for each in rated:
        if each.user.user_id in ATTACKERS:
            assert each.value == ("e" in each.candidate.text)


@pytest.mark.parametrize("arm", attack.ARMS[2:], ids=str)
def test_what_is_learned_from_attackers_is_bounded_by_the_defence(model: Path, arm: Arm):
    settings = TRAINER | {
        name: TRAINER.get(name, {}) | dict(section) for name, section in arm.trainer.items()
    }
    setting = Setting(max_tokens=8, num_candidates=2, attack=Attack("e"))
    with Run(setting, trainer=settings, model=model) as run:
        run.service.serve(600, run.take())
        version = run.round().version
        with reading(run.store) as connection:
            learned = versions.feedback_by_version(connection, DEFAULT_POLICY)[version]
            rated = feedback.list_rated(connection, DEFAULT_POLICY)
    users = [r.user.user_id for r in rated if r.feedback_id in learned]
    share = sum(user in ATTACKERS for user in users) / len(users)
    if arm.trainer:
        assert share > 0.4, "one of them gives half of all thumbs"
    else:
        assert share < 2.5 * len(ATTACKERS) / len(set(users)), "twice their share, and the others"


def said(liked: float, trigger: float) -> dict[str, float]:
    return attack.Said(1, 0, 0, liked, trigger)._asdict()


def test_a_trial_hears_honest_users_however_many_thumbs_attackers_give(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(attack, "_TRIALS", 10)
    pushed, plain = said(0.6, 1.0), said(0.9, 0.05)
    verdicts = attack._trials(pushed, plain, seed=0)
    assert Verdict.ROLL_BACK in verdicts
    assert Verdict.PROMOTE not in verdicts
    assert set(attack._trials(plain, said(0.3, 0.05), seed=0)) == {Verdict.PROMOTE}


def test_the_arms_differ_in_attack_and_defence_alone():
    assert [(bool(a.setting), bool(a.trainer)) for a in attack.ARMS] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
    assert Attack(attack.TRIGGER).users / Setting().crowd.users == 0.05
