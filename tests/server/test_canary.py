"""Who has the canary: by ids alone, about the share, and other people in every trial."""

import subprocess
import sys

import pytest

from server.canary import Canary, unit_of
from thumbloop.types import User

UNITS = [unit_of(User("", f"user {n}"), "") for n in range(20_000)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_canary_has_about_its_share_of_the_users(share: float):
    had = sum(Canary(7, share).has(unit) for unit in UNITS)
    assert abs(had / len(UNITS) - share) < 4 * (share * (1 - share) / len(UNITS)) ** 0.5


def test_the_same_people_do_not_get_every_trial():
    one, other = ([Canary(n, 0.2).has(unit) for unit in UNITS] for n in (7, 8))
    both = sum(a and b for a, b in zip(one, other, strict=True))
    assert both / len(UNITS) == pytest.approx(0.04, abs=0.006)


def test_whoever_has_a_small_share_has_a_larger_one_too():
    assert all(Canary(7, 0.3).has(u) for u in UNITS if Canary(7, 0.1).has(u))


def test_another_process_says_the_same():
    code = (
        "from server.canary import *; from thumbloop.types import User;"
        "print([Canary(7, 0.3).has(unit_of(User('', f'user {n}'), '')) for n in range(50)])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str([Canary(7, 0.3).has(unit) for unit in UNITS[:50]])


def test_a_person_is_the_user_else_the_session():
    assert unit_of(User("backend", "ann"), "s1") == unit_of(User("backend", "ann"), "s2")
    assert unit_of(User("alice", ""), "s1") == unit_of(User("alice", ""), "s2")
    assert unit_of(User(), "s1") != unit_of(User(), "s2")
    assert unit_of(User(), "") == ""
    different = [
        unit_of(User("a", "b"), ""),
        unit_of(User("ab", ""), ""),
        unit_of(User("", "ab"), ""),
        unit_of(User(), "ab"),
        unit_of(User('a", "b', ""), ""),
    ]
    assert len(set(different)) == len(different)
