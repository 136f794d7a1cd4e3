"""The round that two trainers are given, and what is read of how each did it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loadtest import first, rounds
from loadtest.fill import HISTORY, fill
from loadtest.first import NoHistory, check_out
from loadtest.history import PROVEN, history_of
from loadtest.rounds import Round, describe_rounds, fill_state, read_round
from loadtest.work import Line, Work
from tests.rows import finished_round, rated, version
from thumbloop.config import State
from thumbloop.config.trainer import Round as RoundSettings
from thumbloop.processes import ProcessFailed
from thumbloop.store import deployments, open_store, reading, versions
from thumbloop.types import VersionState
from trainer import dataset

ROOT = Path(first.__file__).parents[1]


def frozen(score: float, response: tuple[int, ...], *, has_eos: bool = True) -> dict[str, Any]:
    prompt = [7, 20 + round(score)]
    logprobs = [-0.5] * len(response)
    return {
        "prompt": prompt,
        "response": response,
        "logprobs": logprobs,
        "has_eos": has_eos,
        "score": score,
    }


GROUPS = [
    *(frozen(-1.0, (9, 1)), frozen(-1.1, (8, 8), has_eos=False)),
    *(frozen(2.0, (9, 9, 1)), frozen(2.1, (9, 8, 1))),
]


@pytest.fixture
def run(tmp_path: Path) -> State:
    """The store of a run: version 2 and its parent have learned a thumb each, two are new."""
    state = State(folder=tmp_path / "policy" / "state")
    store = open_store(state)
    with store.begin() as connection:
        thumbs = [rated(connection, policy_version=i // 2) for i in range(4)]
        for number in (1, 2):
            learned = tuple(thumb for _, thumb in thumbs[number - 1 : number])
            done = finished_round(number, number - 1, new_feedback=learned)
            versions.finish_round(connection, done, version(number, number - 1))
            deployments.set_state(connection, "default", number, VersionState.CURRENT, at=1.0)
    store.dispose()
    return state


def test_a_round_has_frozen_candidates_a_thumb_for_each_prompt_and_the_versions_own_to_replay(
    run: State, tmp_path: Path
):
    history = history_of(run, 2, GROUPS, candidates=2)
    state = State(folder=tmp_path / "state")
    fill(HISTORY.validate_json(HISTORY.dump_json(history)), state)
    store = open_store(state)
    with reading(store) as connection:
        current = versions.current(connection, "default")
        data = dataset.read(
            connection, "default", current, RoundSettings(max_rollouts=4, min_rollouts=4)
        )
    store.dispose()
    assert (current.version, current.parent) == (2, 0)
    assert PROVEN.items() <= current.metrics.items()
    assert [thumb.is_up for thumb in data.new_thumbs] == [False, True]
    assert [thumb.response for thumb in data.new_thumbs] == [(9, 1), (9, 9, 1)]
    assert len({thumb.user for thumb in data.new_thumbs}) == 2
    assert len(data.older) == 2
    assert [list(rollout.prompt) for rollout in data.rollouts[::2]] == [[7, 19], [7, 22]]
    assert [rollout.response for rollout in data.rollouts] == [g["response"] for g in GROUPS]
    assert [rollout.has_eos for rollout in data.rollouts] == [True, False, True, True]


def test_what_an_earlier_commit_does_not_know_is_left_out(run: State):
    found = HISTORY.dump_python(history_of(run, 2, GROUPS, candidates=2), mode="json")
    found["interactions"][0]["of_a_later_commit"] = 1
    assert len(HISTORY.validate_python(found).interactions) == len(found["interactions"])


def test_the_store_is_filled_by_the_code_of_the_first_trainer(
    run: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Work
):
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"rollouts": GROUPS}))
    monkeypatch.setattr(Work, "freeze", lambda _self: job)
    monkeypatch.setattr(rounds, "CANDIDATES", 2)
    for number in (0, 2):
        (run.versions / f"default/{number:06d}").mkdir(parents=True)
    code = tmp_path / "first"
    code.mkdir()
    (code / "thumbloop").symlink_to(ROOT / "thumbloop")
    state = fill_state(work, code)
    copied = [path.name for path in sorted((state / "versions/default").iterdir())]
    assert copied == ["000000", "000002"]
    store = open_store(State(folder=state))
    with reading(store) as connection:
        assert versions.current(connection, "default").version == 2
    store.dispose()
    (code / "thumbloop").unlink()
    (code / "thumbloop").mkdir()
    (code / "thumbloop/__init__.py").write_text("raise RuntimeError('the first one')")
    with pytest.raises(ProcessFailed, match=r"fill stopped with exit code 1(.|\n)*the first one"):
        fill_state(work, code)


SAID = """\
waiting for 64 new thumbs; version 2 is current
training on cpu, metrics on 9465
round 1: 64 new thumbs and 256 candidates on version 2
  evidence 1.5 s
  reward fit 2.0 s
round 1: published version 3; 9.0 s, reward AUROC 0.900, KL to the reference 0.50 nats per reply"""


def lines(said: str = SAID) -> list[Line]:
    return [Line(10.0 + i, words) for i, words in enumerate(said.splitlines())]


def test_a_round_lasts_from_when_the_trainer_is_ready_to_the_published_version():
    done = read_round(lines())
    assert done == Round(4.0, {"evidence": 1.5, "reward_fit": 2.0}, thumbs=64, candidates=256)


def test_a_round_that_published_nothing_is_none():
    blocked = SAID.replace("published version 3", "published nothing: update_norm")
    with pytest.raises(ProcessFailed, match=r"published version(.|\n)*nothing: update_norm"):
        read_round(lines(blocked))


def test_rounds_are_compared_repeat_by_repeat_and_stage_by_stage():
    ours = [Round(s, {"ppo": s / 2}, 64, 256, 16, f"of {s}") for s in (4.0, 6.0)]
    older = [Round(s, {"ppo": s, "probes": 1.0}, 64, 256, 15) for s in (8.0, 8.0)]
    found = describe_rounds({"ours": ours, "first": older})
    assert found["round.ratio_to_first"] == (0.625, 0.5, 0.75)
    assert found["round.distinct_versions"].value == 2
    assert found["round.ours_ppo_s"] == (2.5, 2.0, 3.0)
    assert found["round.first_probes_s"] == (1.0, 1.0, 1.0)
    assert found["round.first_optimizer_steps"].value == 15
    assert "round.ours_probes_s" not in found


def test_rounds_on_other_data_are_not_compared():
    whole, part = Round(1.0, {}, 64, 256, 16), Round(1.0, {}, 64, 252, 16)
    with pytest.raises(ProcessFailed, match="252"):
        describe_rounds({"ours": [whole], "first": [part]})


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, in which we are."""
    folder = tmp_path / "repository"
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer/loop.py").write_text("first")
    me = ("-c", "user.name=me", "-c", "user.email=me@localhost")
    for command in (("init", "-q"), ("add", "."), (*me, "commit", "-qm", "first")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    return folder


def test_an_earlier_trainer_is_taken_from_the_history_once(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(first, "COMMIT", "HEAD")
    code = check_out(tmp_path / "first")
    assert (code / "trainer/loop.py").read_text() == "first"
    (code / "trainer/loop.py").write_text("kept")
    assert check_out(tmp_path / "first") == code
    assert (code / "trainer/loop.py").read_text() == "kept"


def test_without_the_history_it_says_what_to_do(repository: Path, tmp_path: Path):
    with pytest.raises(NoHistory, match=r"384ec85 cannot be taken(.|\n)*--unshallow"):
        check_out(tmp_path / "first")
    assert not (tmp_path / "first").exists()
