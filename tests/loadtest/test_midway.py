from typing import Any

import pytest

from loadtest.midway import NotMidway, choose


def version(number: int, rate: float | None) -> dict[str, Any]:
    return {"policy_version": number, "policy_thumb_up_rate": rate}


def test_the_version_nearest_to_half_way_is_chosen():
    known = [version(0, 0.55), version(1, 0.45), version(2, 0.6), version(3, 0.9)]
    assert choose(known) == (2, 0.6)


@pytest.mark.parametrize(
    "known",
    [
        [version(0, 0.5), version(1, 0.3), version(2, 0.8)],
        [version(0, 0.5), version(1, 0.5)],
        [version(0, 0.5), version(1, None), version(2, None)],
    ],
)
def test_a_run_without_one_says_what_to_do(known: list[dict[str, Any]]):
    with pytest.raises(NotMidway, match="take another SEED"):
        choose(known)
