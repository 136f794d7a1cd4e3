"""How much of the feedback may come from one user: pure functions of counts.

Whoever gives more thumbs than others has no more right to be heard. The bound is against the average user, so that
users who agree to push something have at most `factor` times their share of the users, whatever they do.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from thumbloop.types import User

MIN_USERS = 10
"""Among fewer nobody is held back: one who rates most for a small team would be mute."""


def user_cap(totals: Sequence[float], share: float) -> float:
    """Return the largest total of one user that is at most a share of what is then left.

    With fewer than 1 / share users no such total exists: then all users count the same.
    """
    largest_first = sorted(totals, reverse=True)
    for capped, total in enumerate(largest_first):
        if capped * share >= 1:
            break
        cap = share * sum(largest_first[capped:]) / (1 - capped * share)
        if total <= cap:
            return cap
    return largest_first[-1]


def most_of_a_user(totals: Collection[int], factor: float) -> float:
    """Return how much feedback counts of one user: `factor` times the average of what then counts of each.

    `totals` has what each user gave. At least 1, and infinite where there are few users.
    """
    if len(totals) < MIN_USERS:
        return math.inf
    return max(1.0, user_cap(list(totals), factor / len(totals)))


def most_of_a_batch(totals: Collection[int], factor: float, size: int) -> float:
    """Return how much of a batch may be one user's: the part of it that they have of all that then counts."""
    most = most_of_a_user(totals, factor)
    if math.isinf(most):
        return most
    return max(1.0, size * most / sum(min(total, most) for total in totals))


def count_within(new_of: Mapping[User, int], older_of: Mapping[User, int], factor: float) -> int:
    """Return how much of users' new feedback may be learned from beside what they gave before."""
    users = new_of.keys() | older_of.keys()
    given = {user: (new_of.get(user, 0), older_of.get(user, 0)) for user in users}
    most = most_of_a_user([sum(both) for both in given.values()], factor)
    room = 0
    for new, older in given.values():
        left = max(0.0, most - older)
        room += new if new <= left else math.floor(left)
    return room
