"""A round stands on its parent and its data: what becomes of it where they are damaged, replaced or deleted."""

import shutil

import pytest

from thumbloop import artifacts
from thumbloop.errors import BadPolicyVersion
from thumbloop.leases import claim
from thumbloop.store import deployments
from trainer import probes, publishing


def test_a_round_whose_parent_was_replaced_publishes_nothing_and_says_so(bench, monkeypatch):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    describe = publishing.describe

    def roll_back_meanwhile(*arguments):
        bench.adopt(0)
        return describe(*arguments)

    monkeypatch.setattr(publishing, "describe", roll_back_meanwhile)
    bench.loop.step()
    assert bench.versions() == [0, 1]
    assert bench.rounds()[-1]["reason"].startswith("superseded: version 0 ")
    assert bench.rounds()[-1]["version"] is None
    assert not (bench.config.state.versions / "default" / "000002").exists()
    assert "published nothing: version 0 became current meanwhile" in bench.lines[-1]


def test_a_round_whose_data_was_erased_meanwhile_publishes_nothing(bench, monkeypatch):
    bench.rate(40)
    describe = publishing.describe

    def forget_somebody_meanwhile(*arguments):
        assert bench.forget("user 3").interactions
        return describe(*arguments)

    monkeypatch.setattr(publishing, "describe", forget_somebody_meanwhile)
    assert bench.loop.step()
    assert bench.versions() == [0]
    assert bench.rounds()[-1]["reason"] == (
        "superseded: data that it learned from was erased meanwhile"
    )
    assert not (bench.config.state.versions / "default" / "000001").exists()
    monkeypatch.setattr(publishing, "describe", describe)
    left = bench.new_feedback(0)
    assert 32 <= left < 40
    bench.rate(40 + 16 - left)
    assert bench.loop.step()
    assert not bench.get(1).is_tainted  # nobody's data is in it who is gone


def _flip_a_bit(folder):
    path = folder / "reward" / artifacts.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _lose_the_critic(folder):
    shutil.rmtree(folder / "value")


def _alter_the_manifest(folder):
    path = folder / artifacts.MANIFEST
    path.write_text(path.read_text().replace('"parent": 0', '"parent": 9'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip_a_bit, "file_altered"),
        (_lose_the_critic, "file_missing"),
        (_alter_the_manifest, "manifest_altered"),
        (shutil.rmtree, "manifest_missing"),
    ],
)
def test_nothing_is_trained_from_a_version_that_is_not_what_was_published(bench, damage, reason):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    damage(bench.config.state.versions / bench.get(1).folder)
    with pytest.raises(BadPolicyVersion) as raised:
        bench.loop.step()
    assert raised.value.reason == reason
    assert (len(bench.rounds()), bench.versions()) == (1, [0, 1])


def test_nothing_is_trained_from_a_version_of_another_base_model(bench):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    bench.base = bench.base.model_copy(update={"tokenizer_digest": "o" * 64})
    with pytest.raises(BadPolicyVersion, match="wrong_base_model"):
        bench.new_loop().step()
    assert (len(bench.rounds()), bench.versions()) == (1, [0, 1])


def test_nobody_deletes_the_parent_of_a_round_that_is_under_way(bench, monkeypatch):
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    folder = bench.config.state.versions / bench.get(1).folder
    claimed: list[bool] = []
    make = probes.make

    def look(*arguments, **options):
        with claim(folder) as is_ours:
            claimed.append(is_ours)
        return make(*arguments, **options)

    monkeypatch.setattr(probes, "make", look)  # the last step before the version is written
    bench.loop.step()
    with claim(folder) as is_ours:
        assert (claimed, is_ours) == ([False], True)


def test_a_round_whose_parent_was_deleted_meanwhile_is_dropped(bench, monkeypatch):
    """Others came and were current between the look into the store and the round's beginning."""
    bench.rate(40)
    bench.loop.step()
    bench.adopt(1)
    bench.rate(40, version=1)
    read = bench.loop._read

    def late(due):
        data = read(due)
        bench.adopt(0)
        with bench.engine.begin() as connection:
            deployments.collect(connection, "default", 1, at=2.0, reason="")
        artifacts.set_aside(bench.config.state.versions, "default", 1)
        return data

    monkeypatch.setattr(bench.loop, "_read", late)
    assert not bench.loop.step()
    assert "dropped, as version 1 is not current any more" in bench.lines[-1]
    assert (len(bench.rounds()), bench.versions()) == (1, [0, 1])
    assert bench.new_feedback(0) == 80
