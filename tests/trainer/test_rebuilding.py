"""What the trainer does when the current version learned from a user who was forgotten."""

import pytest
import torch
from sqlalchemy import select

from tests.bench import Bench
from thumbloop import artifacts
from thumbloop.config import TrainerConfig
from thumbloop.config.trainer import Gate
from thumbloop.store import reading
from thumbloop.store.schema import round_inputs
from trainer import publishing


def set_rebuilding(bench: Bench, *, rebuild_tainted: bool) -> None:
    changed = bench.config.round.model_copy(update={"rebuild_tainted": rebuild_tainted})
    bench.config = bench.config.model_copy(update={"round": changed})
    bench.loop = bench.new_loop()


@pytest.fixture
def bench(tmp_path, tiny_model):
    """Version 2 is current; it and its parent, version 1, learned from all users."""
    bench = Bench(tmp_path, tiny_model, gate=Gate(enabled=False))
    for number in (0, 1):
        bench.rate(40, version=number)
        assert bench.loop.step()
        bench.adopt(number + 1)
    yield bench
    bench.engine.dispose()


def inputs(bench: Bench, round_id: str) -> dict[str, set[str]]:
    """Return what a round used, by role."""
    with reading(bench.engine) as connection:
        rows = connection.execute(select(round_inputs).where(round_inputs.c.round_id == round_id))
        used = [(row.role, row.row) for row in rows]
    return {role: {row for of, row in used if of == role} for role, _ in used}


def test_the_next_version_is_learned_anew_from_the_last_clean_one(bench):
    set_rebuilding(bench, rebuild_tainted=True)
    before = [inputs(bench, bench.get(n).round_id) for n in (1, 2)]
    assert bench.forget("user 3").tainted == (1, 2)
    assert bench.loop.step()  # at once: what is left was not tried without the rest
    rebuilt = bench.get(3)
    assert (rebuilt.parent, rebuilt.is_tainted) == (0, False)
    used = inputs(bench, rebuilt.round_id)
    erased = bench.forget("user 3")
    assert erased.interactions == 0
    assert used["new"] < before[0]["new"] | before[1]["new"]
    assert len(used["new"]) == bench.new_feedback(0)
    assert "replay" not in used
    folder = bench.config.state.versions / rebuilt.folder
    assert artifacts.read_manifest(folder, rebuilt.manifest_digest).parent == 0
    bench.adopt(3)
    assert not bench.loop.step()  # and goes on from there
    assert bench.lines[-1].endswith("version 3 is current")


def test_it_waits_until_the_server_has_tried_what_was_learned_anew(bench):
    set_rebuilding(bench, rebuild_tainted=True)
    bench.forget("user 3")
    assert bench.loop.step()
    bench.rate(40, version=2)
    assert not bench.loop.step()
    assert bench.lines[-1] == "waiting for the server to try version 3"


def test_what_waits_for_feedback_says_from_where_it_goes_on(bench):
    set_rebuilding(bench, rebuild_tainted=True)
    for number in range(17):
        bench.forget(f"user {number}")
    assert not bench.loop.step()
    assert bench.lines[-1].endswith("version 0 is learned from, as the current one is tainted")


def test_without_the_setting_it_goes_on_from_the_tainted_one(bench):
    bench.forget("user 3")
    bench.rate(40, version=2)
    assert bench.loop.step()
    assert (bench.get(3).parent, bench.get(3).is_tainted) == (2, True)


def test_a_clean_version_is_not_rebuilt(bench):
    set_rebuilding(bench, rebuild_tainted=True)
    bench.forget("somebody who never came")
    bench.rate(40, version=2)
    assert bench.loop.step()
    assert bench.get(3).parent == 2


def test_a_round_whose_parent_is_found_to_be_tainted_publishes_nothing(bench, monkeypatch):
    set_rebuilding(bench, rebuild_tainted=True)
    describe = publishing.describe

    def forget_somebody_meanwhile(*arguments):
        bench.forget("user 3")
        return describe(*arguments)

    bench.rate(40, version=2)
    monkeypatch.setattr(publishing, "describe", forget_somebody_meanwhile)
    assert bench.loop.step()
    assert bench.versions() == [0, 1, 2]
    assert bench.rounds()[-1]["reason"] == (
        "superseded: the current version is tainted, the next one grows from version 0"
    )
    monkeypatch.setattr(publishing, "describe", describe)
    assert bench.loop.step()
    assert bench.get(3).parent == 0


def test_adapters_are_those_of_the_version_learned_from(bench, monkeypatch):
    set_rebuilding(bench, rebuild_tainted=True)
    bench.forget("user 3")
    learn, began = bench.loop._learner.learn, []

    def noted(lesson, generator):
        began.append([p.clone() for p in bench.trunk.parameters("policy").values()])
        return learn(lesson, generator)

    monkeypatch.setattr(bench.loop._learner, "learn", noted)
    assert bench.loop.step()
    bench.trunk.reset()
    fresh = list(bench.trunk.parameters("policy").values())
    assert all(torch.equal(a, b) for a, b in zip(began[0], fresh, strict=True) if not b.any())


def test_the_setting_is_off_unless_it_is_turned_on():
    assert not TrainerConfig().round.rebuild_tainted
