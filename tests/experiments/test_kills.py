"""A trainer is killed for real, at a spread of places; `python -m experiments kills` goes through them all."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from experiments import forked, kills
from experiments.__main__ import app
from experiments.forked import HUNG_S
from experiments.kills import ANY_MOMENT, Killed, plan, summarise
from experiments.survival import Kill, Scene, prepare, wrongs

EVERY = 40
"""One of so many places in each scene is tried, besides those around a version's becoming visible."""
DECISIVE = (
    "after rename default/temporary",
    "before insert into policy_versions",
    "before commit of rounds, round_inputs, policy_versions",
    "after commit of rounds, round_inputs, policy_versions",
    "after commit of rounds, round_inputs",
)


@pytest.fixture(scope="module")
def pool():
    """A process that has run no torch operation, and may fork."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


@pytest.fixture(scope="module")
def scenes(pool, tmp_path_factory) -> list[Scene]:
    return pool.submit(prepare, tmp_path_factory.mktemp("scenes") / "0", 0).result()


def test_the_scenes_publish_replay_block_and_give_back(scenes: list[Scene]):
    by_name = {scene.name: scene for scene in scenes}
    ends = {name: scene.after.rounds[-1:] for name, scene in by_name.items()}
    assert ends["first start"] == ()
    decided = {name: (parent, version) for name, ((parent, version, *_), *_) in _some(ends)}
    assert decided == {
        "first round": (0, 1),
        "round with replay": (1, 2),
        "blocked round": (2, None),
        "round after a rollback": (1, 3),
        "round after a kill": (3, 4),
    }
    used = {name: inputs for name, ((*_, inputs),) in _some(ends)}
    assert "replay" not in used["first round"]
    assert used["round with replay"]["replay"]
    blocked, again = used["blocked round"]["new"], used["round after a rollback"]["new"]
    assert set(used["round with replay"]["new"]) | set(blocked) == set(again)
    compared = used["blocked round"]["preference"]
    assert by_name["blocked round"].before.new_feedback == len(blocked) + len(compared)
    assert by_name["blocked round"].after.new_feedback == len(blocked) + len(compared)


def test_in_the_scenes_preferences_are_learned_replayed_and_given_back(scenes: list[Scene]):
    used = {scene.name: scene.after.rounds[-1][-1] for scene in scenes if scene.after.rounds}
    first, second, blocked, again, last = used.values()
    assert (len(first["preference"]), "old_preference" in first) == (4, False)
    assert set(second["old_preference"]) <= set(first["preference"])
    assert set(second["preference"]) | set(blocked["preference"]) == set(again["preference"])
    assert len(again["preference"]) == 8
    assert set(last["old_preference"]) <= {*first["preference"], *again["preference"]}


def _some(ends: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, end) for name, end in ends.items() if end]


def test_all_of_a_version_is_on_disk_before_its_row_is_written(scenes: list[Scene]):
    places = next(scene.places for scene in scenes if scene.name == "round with replay")
    assert len([place for place in places if place.startswith("before sync")]) > 10
    temporary = [p for p in places if p.startswith("after sync default/temporary")]
    for name in (
        "manifest.json",
        "policy/adapter_model.safetensors",
        "value/value_head.safetensors",
    ):
        assert f"after sync default/temporary/{name}" in temporary
    in_order = [
        "after write default/temporary/manifest.json",
        *temporary,
        "before rename default/temporary",
        "after sync default",
        "before insert into rounds",
        "before insert into policy_versions",
        "before commit of rounds, round_inputs, policy_versions",
    ]
    assert [place for place in places if place in in_order] == in_order


def test_nothing_is_wrong_wherever_a_trainer_is_killed(pool, scenes: list[Scene]):
    trials = [
        Kill(scene, place, HUNG_S)
        for scene in scenes
        for i, place in enumerate(scene.places)
        if i % EVERY == 0
        or (place in DECISIVE and scene.name in {"round with replay", "blocked round"})
    ]
    trials += [Kill(scene, "", 0.7 * scene.seconds) for scene in scenes]
    assert len(trials) >= 20
    found = list(pool.map(wrongs, trials))
    assert [
        f"{t.scene.name}, {t.place}: {w}" for t, w in zip(trials, found, strict=True) if w
    ] == []


def test_a_place_that_is_never_reached_is_no_kill(pool, scenes: list[Scene]):
    (wrong,) = pool.submit(wrongs, Kill(scenes[-1], "at the end of time", HUNG_S)).result()
    assert wrong.startswith("the trainer was not killed")


def test_a_kill_that_comes_too_late_is_tried_again_earlier(pool, scenes: list[Scene], tmp_path):
    assert pool.submit(_killed_late, scenes[1], tmp_path / "ends").result() == []
    ends = (tmp_path / "ends").read_text().split()
    assert ends[0] == "0"
    assert ends[-2:] == ["9", "0"]  # killed at last, and the next one finished


def _killed_late(scene: Scene, ends: Path) -> list[str]:
    run = forked.run

    def noted(*arguments: Any, **options: Any) -> forked.Ended:
        ended = run(*arguments, **options)
        with ends.open("a") as lines:
            lines.write(f"{ended.signal}\n")
        return ended

    with patch.object(forked, "run", noted):
        return wrongs(Kill(scene, "", 3 * scene.seconds))


def scene(name: str, *places: str) -> Scene:
    nothing: Any = None
    return Scene(name, 0, Path(), Path(), {}, nothing, nothing, places, 1.5)


def test_every_place_gets_its_kills_over_all_rounds_that_pass_it():
    planned = list(plan([scene("a", "x"), scene("b", "x", "y")], 3))
    assert [(k.scene.name, k.place) for k in planned] == [
        *(("a", "x"), ("b", "x"), ("a", "x")),
        *(("b", "y"),) * 3,
        *(("a", ""),) * 3,
        *(("b", ""),) * 3,
    ]
    assert all(0 <= k.after_s <= 1.5 for k in planned if not k.place)


def test_wrong_states_are_counted_and_told_by_place():
    rows = summarise(
        [Killed("x", "a", []), Killed("x", "b", ["bad", "worse"]), Killed("y", "b", [])]
    )
    assert [(r["place"], r["kills"], r["wrong_states"]) for r in rows] == [("x", 2, 1), ("y", 1, 0)]
    assert (rows[0]["scenes"], rows[0]["wrong"]) == ({"a": 1, "b": 1}, {"bad": 1, "worse": 1})


@pytest.mark.parametrize(("wrong", "code"), [([], 0), (["two versions are current"], 1)])
def test_the_command_says_and_writes_what_it_found(monkeypatch, tmp_path, wrong, code):
    class Here(ProcessPoolExecutor):
        map = staticmethod(map)

    monkeypatch.setattr(kills, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(kills, "prepare", lambda _folder, _seed: [scene("a", "x")])
    monkeypatch.setattr(kills, "wrongs", lambda kill: wrong if kill.place else [])
    result = CliRunner().invoke(
        app, ["kills", "--kills", "2", "--seeds", "1", "--folder", str(tmp_path)]
    )
    assert result.exit_code == code, result.output
    assert f"4 kills at 2 places: {2 * code} wrong states" in result.output
    report = json.loads((tmp_path / "kills.json").read_text())
    assert (report["kills"], report["wrong_states"]) == (4, 2 * code)
    assert [row["place"] for row in report["places"]] == ["x", ANY_MOMENT]
