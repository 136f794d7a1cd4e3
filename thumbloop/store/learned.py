"""What rounds learned as new, and how much there is that none did."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

from sqlalchemy import Connection, Select, String, Table, cast, select

from thumbloop.store.schema import feedback, preferences, round_inputs


class NewFeedback(NamedTuple):
    """How much feedback nobody learned yet, on replies that may be learned from and on others."""

    usable: int = 0
    unusable: int = 0

    @classmethod
    def of(cls, may_teach: Iterable[bool]) -> Self:
        """Count feedback by whether its reply may be learned from."""
        counted = Counter(map(bool, may_teach))
        return cls(counted[True], counted[False])

    def plus(self, other: "NewFeedback") -> "NewFeedback":
        """Return both together."""
        return NewFeedback(self.usable + other.usable, self.unusable + other.unusable)


def learned_thumbs(connection: Connection, round_ids: Iterable[str]) -> set[tuple[str, int]]:
    """Return the replies of which these rounds learned a thumb, and its value."""
    query = _inputs("new", round_ids, feedback, "response_id", "value")
    return {(row.response_id, row.value) for row in connection.execute(query)}


def learned_preferences(
    connection: Connection, round_ids: Iterable[str]
) -> set[tuple[str, int, int]]:
    """Return the replies of which these rounds learned a preference, and its better and worse candidate."""
    query = _inputs("preference", round_ids, preferences, "response_id", "better", "worse")
    return {(row.response_id, row.better, row.worse) for row in connection.execute(query)}


def learned_replies(connection: Connection, round_ids: Iterable[str]) -> set[str]:
    """Return the replies of which these rounds learned any thumb or preference."""
    ids = list(round_ids)
    rated = {response_id for response_id, _ in learned_thumbs(connection, ids)}
    return rated | {response_id for response_id, _, _ in learned_preferences(connection, ids)}


def _inputs(role: str, round_ids: Iterable[str], table: Table, *columns: str) -> Select[Any]:
    return (
        select(*(table.c[name] for name in columns))
        .join(round_inputs, round_inputs.c.row == cast(table.c.id, String))
        .where(round_inputs.c.role == role, round_inputs.c.round_id.in_(list(round_ids)))
    )
