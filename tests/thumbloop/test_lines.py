"""Who grew from whom: 0 <- 1 <- 2 <- 4, and 1 <- 3."""

from dataclasses import replace

import pytest

from tests.rows import version
from thumbloop.lines import descendants, line, may_follow

FAMILY = [version(0, None), version(1, 0), version(2, 1), version(3, 1), version(4, 2)]


def tainted(*numbers: int) -> list:
    return [replace(v, is_tainted=v.version in numbers) for v in FAMILY]


def test_a_line_leads_from_a_version_to_the_base_model():
    assert [v.version for v in line(FAMILY, FAMILY[4])] == [4, 2, 1, 0]
    assert [v.version for v in line(FAMILY, FAMILY[0])] == [0]


@pytest.mark.parametrize(
    ("ancestors", "found"),
    [([], []), ([4], []), ([2], [4]), ([1], [2, 3, 4]), ([0], [1, 2, 3, 4]), ([2, 3], [4])],
)
def test_descendants_are_all_that_grew_from_them(ancestors, found):
    assert descendants(FAMILY, ancestors) == found


def test_a_child_of_the_current_version_may_follow_it():
    assert may_follow(FAMILY, FAMILY[2], FAMILY[1])
    assert not may_follow(FAMILY, FAMILY[4], FAMILY[1])
    assert not may_follow(FAMILY, FAMILY[3], FAMILY[2])
    family = tainted(2, 4)
    assert may_follow(family, family[4], family[2])


def test_a_clean_child_of_a_clean_ancestor_may_follow_a_tainted_version():
    family = tainted(2, 4)
    assert may_follow(family, family[3], family[2])
    assert may_follow(family, family[3], family[4])
    family = tainted(3)
    assert not may_follow(family, family[4], family[3])  # 2 is no ancestor of 3
    assert may_follow(family, family[2], family[3])
    family = tainted(2, 3, 4)
    assert not may_follow(family, family[3], family[2])
