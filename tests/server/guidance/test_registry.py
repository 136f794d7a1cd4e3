"""A strategy is one file: whatever module of the package has a STRATEGY is served."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import server.guidance
from server.guidance import find_strategies
from tests.serving import running
from thumbloop.config import State
from thumbloop.errors import SettingsError
from thumbloop.types import Strategy
from thumbloop.v1 import policy_pb2

FIFTH = '''
"""The worst of n, for people who like it."""

from server.guidance.pool import run_pooled


class WorstOfN:
    name = "worst_of_n"

    async def run(self, worker, choice, rng):
        return await run_pooled(worker, choice, rng, weights)


def weights(rewards, _temperature):
    worst = min(range(len(rewards)), key=rewards.__getitem__)
    return [float(i == worst) for i in range(len(rewards))]


STRATEGY = WorstOfN()
'''
SHORT = {"short": {"kind": "length", "weight": 1.0, "target_tokens": 0, "scale_tokens": 1.0}}


@pytest.fixture
def fifth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Lay one more file into the package of strategies."""
    folder = tmp_path / "more strategies"
    folder.mkdir()
    (folder / "worst_of_n.py").write_text(FIFTH)
    monkeypatch.setattr(server.guidance, "__path__", [*server.guidance.__path__, str(folder)])
    yield "worst_of_n"
    del sys.modules["server.guidance.worst_of_n"], server.guidance.worst_of_n


def test_the_contracts_four_are_served():
    assert set(find_strategies()) >= {s.value for s in Strategy}


def test_a_fifth_strategy_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "worst_of_n.py").write_text(FIFTH)
    package = ModuleType("a_package_of_strategies")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert set(find_strategies(package)) == {"worst_of_n"}


async def test_a_fifth_strategy_is_served_and_stored_by_its_name(
    fifth: str, tiny_model: Path, state: State
):
    guidance = {"audit_share": 0.0}
    asked = policy_pb2.GuidanceParams(strategy_name=fifth)
    async with running(tiny_model, state, rewards=SHORT, guidance=guidance) as server:
        for seed in range(5):
            reply = await server.generate(
                "hello",
                guidance=asked,
                include_candidates=True,
                sampling=policy_pb2.SamplingParams(seed=seed),
            )
            assert reply.reranked
            assert reply.reward == min(c.reward for c in reply.candidates)
            assert server.stored(reply.response_id).strategy == fifth


async def test_a_fifth_strategy_can_be_the_default(fifth: str, tiny_model: Path, state: State):
    async with running(tiny_model, state, guidance={"strategy": fifth}) as server:
        reply = await server.generate("hello")
        assert server.stored(reply.response_id).strategy == fifth


def test_two_strategies_of_one_name_are_refused(tmp_path, monkeypatch):
    for name in ("worst_of_n", "again"):
        (tmp_path / f"{name}.py").write_text(FIFTH)
    package = ModuleType("another_package_of_strategies")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    with pytest.raises(SettingsError, match="two strategies are called worst_of_n"):
        find_strategies(package)
