"""What leaves the store for other tools: what may be learned from, and nothing else.

A batch at a time is read, each in a transaction of its own: nobody who writes or erases waits for long.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, Select, exists, select
from sqlalchemy.orm import aliased

from thumbloop.store.database import reading
from thumbloop.store.interactions import BATCH, load, prompt_of
from thumbloop.store.schema import candidates, feedback, interactions, preferences, thumbs
from thumbloop.types import BASE_VERSION, Interaction, Learning, Prompt, Status, User


class Selection(NamedTuple):
    """Of which time, unix seconds, `until` excluded, and by which version; None is any."""

    since: float | None = None
    until: float | None = None
    policy_version: int | None = None

    def conditions(self, at: ColumnElement[Any]) -> list[ColumnElement[bool]]:
        """Return what a row has to meet, `at` being its time, beside that it may be learned from."""
        found = [
            interactions.c.learning == Learning.ALLOWED.value,
            interactions.c.status == Status.COMPLETED.value,
        ]
        if self.since is not None:
            found.append(at >= self.since)
        if self.until is not None:
            found.append(at < self.until)
        if self.policy_version is not None:
            found.append(interactions.c.policy_version == self.policy_version)
        return found


EVERYTHING = Selection()


class Said(NamedTuple):
    """A reply of which something was said, by whom, and when, unix seconds."""

    response_id: str
    policy_version: int
    user: User
    prompt: Prompt
    at: float


class RatedText(NamedTuple):
    """A shown reply and its effective thumb."""

    said: Said
    text: str
    is_up: bool


class ComparedTexts(NamedTuple):
    """Two candidates of which a user found one better."""

    said: Said
    better: str
    worse: str


class Rolled(NamedTuple):
    """A reply with all its candidates, its effective thumb (None: nobody gave one), and which candidates were found
    better than which, by index."""

    reply: Interaction
    is_up: bool | None
    preferences: tuple[tuple[int, int], ...]


def rated(engine: Engine, policy: str, which: Selection = EVERYTHING) -> Iterator[RatedText]:
    """Yield effective thumbs with what they judge, in the order they were given. Raises StoreUnavailable."""
    query = (
        select(
            *_of_reply(feedback.c.id, feedback.c.created_at), feedback.c.value, candidates.c.text
        )
        .select_from(thumbs)
        .join(feedback, feedback.c.id == thumbs.c.feedback_id)
        .join(interactions, interactions.c.response_id == thumbs.c.response_id)
        .join(candidates, candidates.c.response_id == thumbs.c.response_id)
        .where(
            interactions.c.policy == policy,
            candidates.c.chosen,
            *which.conditions(feedback.c.created_at),
        )
    )
    for row in _rows(engine, query, feedback.c.id):
        yield RatedText(_said(row), row["text"], bool(row["value"]))


def compared(engine: Engine, policy: str, which: Selection = EVERYTHING) -> Iterator[ComparedTexts]:
    """Yield effective preferences with both texts, in the order they were given. Raises StoreUnavailable."""
    better, worse = aliased(candidates, name="better_one"), aliased(candidates, name="worse_one")
    query = (
        select(
            *_of_reply(preferences.c.id, preferences.c.created_at),
            better.c.text.label("better_text"),
            worse.c.text.label("worse_text"),
        )
        .select_from(preferences)
        .join(interactions, interactions.c.response_id == preferences.c.response_id)
        .join(
            better,
            (better.c.response_id == preferences.c.response_id)
            & (better.c.position == preferences.c.better),
        )
        .join(
            worse,
            (worse.c.response_id == preferences.c.response_id)
            & (worse.c.position == preferences.c.worse),
        )
        .where(
            interactions.c.policy == policy,
            _is_last_word(),
            *which.conditions(preferences.c.created_at),
        )
    )
    for row in _rows(engine, query, preferences.c.id):
        yield ComparedTexts(_said(row), row["better_text"], row["worse_text"])


def rolled(engine: Engine, policy: str, which: Selection = EVERYTHING) -> Iterator[Rolled]:
    """Yield replies that versions of ours gave, oldest first; `which` is about when they were given.

    Raises StoreUnavailable.
    """
    ids = select(interactions.c.response_id).where(
        interactions.c.policy == policy,
        interactions.c.policy_version >= BASE_VERSION,
        *which.conditions(interactions.c.created_at),
    )
    for batch in _pages(engine, ids, interactions.c.response_id):
        names = [row["response_id"] for row in batch]
        with reading(engine) as connection:
            replies = load(connection, names)
            values = _values(connection, names)
            pairs = _pairs(connection, names)
        for reply in replies:
            value = values.get(reply.response_id)
            is_up = None if value is None else bool(value)
            yield Rolled(reply, is_up, tuple(pairs[reply.response_id]))


def _values(connection: Connection, replies: list[str]) -> dict[str, int]:
    """Return the values of the thumbs that count, of those of these replies that have one."""
    found = connection.execute(
        select(thumbs.c.response_id, feedback.c.value)
        .join(feedback, feedback.c.id == thumbs.c.feedback_id)
        .where(thumbs.c.response_id.in_(replies))
    )
    return {row.response_id: row.value for row in found}


def _pairs(connection: Connection, replies: list[str]) -> dict[str, list[tuple[int, int]]]:
    """Return the preferences that count, better and worse candidate, of each of these replies."""
    found = connection.execute(
        select(preferences.c.response_id, preferences.c.better, preferences.c.worse)
        .where(preferences.c.response_id.in_(replies), _is_last_word())
        .order_by(preferences.c.id)
    )
    pairs: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for response_id, better, worse in found:
        pairs[response_id].append((better, worse))
    return pairs


def _is_last_word() -> ColumnElement[bool]:
    """Return the condition that nothing was said of the same two candidates later; cheap for few rows of many."""
    later = preferences.alias("later")
    pair = preferences.c.better, preferences.c.worse
    return ~(
        exists()
        .where(
            later.c.response_id == preferences.c.response_id,
            later.c.id > preferences.c.id,
            later.c.better.in_(pair),
            later.c.worse.in_(pair),
        )
        .correlate(preferences)
    )


def _of_reply(key: ColumnElement[Any], at: ColumnElement[Any]) -> list[ColumnElement[Any]]:
    """Return the columns of Said, and the one to go on from."""
    return [
        key.label("key"),
        at.label("said_at"),
        interactions.c.response_id,
        interactions.c.policy_version,
        interactions.c.subject,
        interactions.c.user_id,
        interactions.c.prompt,
    ]


def _said(row: RowMapping) -> Said:
    return Said(
        row["response_id"],
        row["policy_version"],
        User(row["subject"], row["user_id"]),
        prompt_of(row["prompt"]),
        row["said_at"],
    )


def _rows(engine: Engine, query: Select[Any], key: ColumnElement[Any]) -> Iterator[RowMapping]:
    for page in _pages(engine, query, key):
        yield from page


def _pages(
    engine: Engine, query: Select[Any], key: ColumnElement[Any]
) -> Iterator[list[RowMapping]]:
    """Yield what a query finds in the order of its first column, `key`, a batch in each transaction."""
    ordered, last = query.order_by(key).limit(BATCH), None
    while True:
        with reading(engine) as connection:
            after = ordered if last is None else ordered.where(key > last)
            page = list(connection.execute(after).mappings())
        if not page:
            return
        yield page
        last = next(iter(page[-1].values()))
