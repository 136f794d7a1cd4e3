"""A strategy is one file: whatever module of the package has a STRATEGY is served."""

import sys
from types import ModuleType

import pytest

from server.guidance import find_strategies
from thumbloop.errors import SettingsError
from thumbloop.types import Strategy

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


def test_the_contracts_four_are_served():
    assert set(find_strategies()) == {s.value for s in Strategy}


def test_a_fifth_strategy_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "worst_of_n.py").write_text(FIFTH)
    package = ModuleType("a_package_of_strategies")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert set(find_strategies(package)) == {"worst_of_n"}


def test_two_strategies_of_one_name_are_refused(tmp_path, monkeypatch):
    for name in ("worst_of_n", "again"):
        (tmp_path / f"{name}.py").write_text(FIFTH)
    package = ModuleType("another_package_of_strategies")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    with pytest.raises(SettingsError, match="two strategies are called worst_of_n"):
        find_strategies(package)
