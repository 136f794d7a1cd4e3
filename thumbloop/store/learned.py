"""What rounds learned as new, and how much there is that none did."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, String, Table, cast, select

from thumbloop.store.schema import feedback, preferences, round_inputs
from thumbloop.types import Learning, Status, User

Rounds = Collection[str] | Select[tuple[str]]
"""Ids of rounds, or the query for them."""


class NewFeedback(NamedTuple):
    """How much feedback nobody learned yet: of what may be learned from, and why of the rest nothing may.

    `new_of` and `older_of` are how much of each user may be learned from, and may be replayed.
    """

    usable: int = 0
    left_out: Mapping[str, int] = MappingProxyType({})
    new_of: Mapping[User, int] = MappingProxyType({})
    older_of: Mapping[User, int] = MappingProxyType({})

    @classmethod
    def of(cls, said: Iterable[tuple[RowMapping, bool]], oldest: float) -> Self:
        """Count feedback, each with whether it is new; that from before `oldest` teaches nothing.

        A row has the feedback's time, and the stored owner, learning and status of its reply.
        """
        left_out, new_of, older_of = Counter[str](), Counter[User](), Counter[User]()
        for row, is_new in said:
            reason = reply_left_out(Learning(row["learning"]), Status(row["status"]))
            reason = reason or ("too_old" if row["created_at"] < oldest else None)
            if reason is None:
                (new_of if is_new else older_of)[User(row["subject"], row["user_id"])] += 1
            elif is_new:
                left_out[reason] += 1
        return cls(new_of.total(), left_out, new_of, older_of)

    @property
    def total(self) -> int:
        """Return how much there is of either."""
        return self.usable + sum(self.left_out.values())

    def plus(self, other: "NewFeedback") -> "NewFeedback":
        """Return both together."""
        return NewFeedback(
            self.usable + other.usable,
            Counter(self.left_out) + Counter(other.left_out),
            Counter(self.new_of) + Counter(other.new_of),
            Counter(self.older_of) + Counter(other.older_of),
        )


def reply_left_out(learning: Learning, status: Status) -> str | None:
    """Return why nothing that is said of a reply may be learned from."""
    if learning is Learning.EXCLUDED:
        return "learning_excluded"
    if status is not Status.COMPLETED:
        return status.value
    return None


def learned_thumbs(connection: Connection, round_ids: Rounds) -> set[tuple[str, int]]:
    """Return the replies of which these rounds learned a thumb, and its value."""
    query = _inputs("new", round_ids, feedback, "response_id", "value")
    return {(row.response_id, row.value) for row in connection.execute(query)}


def learned_preferences(connection: Connection, round_ids: Rounds) -> set[tuple[str, int, int]]:
    """Return the replies of which these rounds learned a preference, and its better and worse candidate."""
    query = _inputs("preference", round_ids, preferences, "response_id", "better", "worse")
    return {(row.response_id, row.better, row.worse) for row in connection.execute(query)}


def learned_replies(connection: Connection, round_ids: Rounds) -> set[str]:
    """Return the replies of which these rounds learned any thumb or preference."""
    rated = {response_id for response_id, _ in learned_thumbs(connection, round_ids)}
    return rated | {response_id for response_id, _, _ in learned_preferences(connection, round_ids)}


def keep_newest(
    rows: Iterable[RowMapping], is_new: Callable[[RowMapping], bool], max_older: float
) -> Iterator[tuple[RowMapping, bool]]:
    """Yield all rows that are new and the first `max_older` of the others, each with whether it is new."""
    older = 0
    for row in rows:
        new = is_new(row)
        older += not new
        if new or older <= max_older:
            yield row, new


def is_among(round_ids: Rounds) -> ColumnElement[bool]:
    """Return the condition that an input is of one of these rounds."""
    ids = round_ids if isinstance(round_ids, Select) else list(round_ids)
    return round_inputs.c.round_id.in_(ids)


def _inputs(role: str, round_ids: Rounds, table: Table, *columns: str) -> Select[Any]:
    return (
        select(*(table.c[name] for name in columns))
        .join(round_inputs, round_inputs.c.row == cast(table.c.id, String))
        .where(round_inputs.c.role == role, is_among(round_ids))
    )
