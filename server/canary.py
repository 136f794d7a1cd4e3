"""Who has the canary: a share of the users, by their ids alone, so that every server says the same."""

import hashlib
import json
from typing import NamedTuple

from thumbloop.types import User

_BUCKETS = 2**64


class Canary(NamedTuple):
    """The version on trial, and the share of the users who have it."""

    version: int
    share: float

    def has(self, unit: str) -> bool:
        """Say whether this user is one of them. Another version's trial has others."""
        digest = hashlib.blake2b(f"{self.version}:{unit}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * _BUCKETS


def unit_of(user: User, session_id: str) -> str:
    """Return what stands for one person in a trial: the user, else the session; empty for nobody."""
    if user != User():
        return json.dumps(["user", user.subject, user.user_id])
    return json.dumps(["session", session_id]) if session_id else ""
