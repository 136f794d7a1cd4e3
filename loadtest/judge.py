"""The judge of a journal: was every reply its version's own, and every thumb kept and learned once?

It reads what callers wrote down, and then the store, as those who test databases do: nothing that the
server says of itself counts.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import select

from loadtest.journal import OK, Entry
from thumbloop.config import State
from thumbloop.store import feedback, interactions, open_store, reading, versions
from thumbloop.store.schema import feedback as events_table
from thumbloop.types import DEFAULT_POLICY, Interaction


class Stored(NamedTuple):
    """What the store has: replies by id, effective thumbs and events of feedback by reply, and which versions learned
    which thumbs."""

    replies: Mapping[str, Interaction]
    thumbs: Mapping[str, tuple[int, int]]
    events: Mapping[str, int]
    learned: Mapping[int, set[int]]
    parents: Mapping[int, int | None]


def read(state: State) -> Stored:
    """Read the store of a server that has ended, or runs."""
    database = open_store(state)
    try:
        with reading(database) as connection:
            replies = interactions.list_since(connection, DEFAULT_POLICY, 0)
            rated = feedback.list_rated(connection, DEFAULT_POLICY)
            events = Counter(connection.scalars(select(events_table.c.response_id)))
            learned = versions.feedback_by_version(connection, DEFAULT_POLICY)
            known = versions.list_versions(connection, DEFAULT_POLICY)
    finally:
        database.dispose()
    return Stored(
        {reply.response_id: reply for reply in replies},
        {each.response_id: (each.feedback_id, each.value) for each in rated},
        dict(events),
        learned,
        {version.version: version.parent for version in known},
    )


def mixed_replies(entries: Sequence[Entry], sources: Mapping[int, str]) -> list[str]:
    """Return what is wrong with greedy replies: each has to be what its version says alone.

    `sources` names the weights of versions that share them with others; the rest have their own. What a
    version says alone is asked for in entries of the kind `solo`; where none was, all its replies to the
    same prompt have to be the same.
    """
    said: dict[tuple[str, int], str] = {}
    wrong = []
    for entry in sorted(entries, key=lambda e: e.kind != "solo"):
        if entry.kind not in ("solo", "generate") or entry.status != OK or entry.prompt is None:
            continue
        version = entry.what["version"]
        key = sources.get(version, str(version)), entry.prompt
        if entry.what["text"] != said.setdefault(key, entry.what["text"]):
            wrong.append(
                f"{entry.what['response_id']} names version {version}, which answers prompt"
                f" {entry.prompt} otherwise"
            )
    return wrong


def told_apart(entries: Sequence[Entry], sources: Mapping[int, str]) -> int:
    """Return how many prompts all weights answer differently, alone: only there mixing is seen whichever two it mixes."""
    said: defaultdict[int, dict[str, str]] = defaultdict(dict)
    for entry in entries:
        if entry.kind == "solo" and entry.status == OK and entry.prompt is not None:
            version = entry.what["version"]
            said[entry.prompt][sources.get(version, str(version))] = entry.what["text"]
    return sum(
        len(replies) > 1 and len(set(replies.values())) == len(replies) for replies in said.values()
    )


def unstored_replies(entries: Sequence[Entry], stored: Stored) -> list[str]:
    """Return the replies that somebody got and the store has not, or has otherwise."""
    wrong = []
    for entry in entries:
        if entry.kind != "generate" or entry.status != OK:
            continue
        row = stored.replies.get(entry.what["response_id"])
        if row is None:
            wrong.append(f"{entry.what['response_id']} is not stored")
        elif (row.policy_version, row.chosen.text) != (entry.what["version"], entry.what["text"]):
            wrong.append(f"{row.response_id} is stored as another reply")
        elif {c.policy_version for c in row.candidates} != {row.policy_version}:
            wrong.append(f"{row.response_id} has candidates of other versions")
    return wrong


def lost_thumbs(entries: Sequence[Entry], stored: Stored) -> list[str]:
    """Return the replies whose acknowledged thumb the store has not, or with another value."""
    acknowledged = {
        e.what["response_id"]: int(e.what["up"])
        for e in entries
        if e.kind == "rate" and e.status == OK
    }
    return [
        response_id
        for response_id, value in acknowledged.items()
        if stored.thumbs.get(response_id, (0, None))[1] != value
    ]


def thumbs_stored_twice(stored: Stored) -> list[str]:
    """Return the replies with more than one event of feedback: each is rated once, however often it is sent."""
    return [response_id for response_id, count in stored.events.items() if count > 1]


def thumbs_learned_twice(stored: Stored) -> list[int]:
    """Return the thumbs that some version and one of its ancestors both learned as new."""
    twice: set[int] = set()
    for version in stored.parents:
        counts: Counter[int] = Counter()
        ancestor: int | None = version
        while ancestor is not None:
            counts.update(stored.learned.get(ancestor, ()))
            ancestor = stored.parents[ancestor]
        twice |= {thumb for thumb, count in counts.items() if count > 1}
    return sorted(twice)


def first_replies(entries: Sequence[Entry]) -> dict[int, float]:
    """Return how long after its publication each version gave its first reply, seconds."""
    published = {e.what["version"]: e.ended for e in entries if e.kind == "publish"}
    answered: defaultdict[int, list[float]] = defaultdict(list)
    for entry in entries:
        if entry.kind == "generate" and entry.status == OK:
            answered[entry.what["version"]].append(entry.ended)
    return {
        number: min(answered[number]) - at for number, at in published.items() if answered[number]
    }


def longest_silence_s(entries: Sequence[Entry]) -> float:
    """Return the longest time in which nobody was answered."""
    ends = sorted(e.ended for e in entries if e.kind == "generate" and e.status == OK)
    return max((later - earlier for earlier, later in pairwise(ends)), default=0.0)


def statuses(entries: Sequence[Entry]) -> dict[str, int]:
    """Return how calls ended."""
    return dict(Counter(f"{e.kind} {e.status}" for e in entries if e.kind in ("generate", "rate")))


def verdict(entries: Sequence[Entry], stored: Stored, sources: Mapping[int, str]) -> dict[str, Any]:
    """Return all that can be said of a journal; what is wrong as counts, with the first few by name."""
    found: dict[str, Sequence[Any]] = {
        "mixed_replies": mixed_replies(entries, sources),
        "unstored_replies": unstored_replies(entries, stored),
        "lost_thumbs": lost_thumbs(entries, stored),
        "thumbs_stored_twice": thumbs_stored_twice(stored),
        "thumbs_learned_twice": thumbs_learned_twice(stored),
    }
    shown: dict[str, Any] = {name: len(wrong) for name, wrong in found.items()}
    shown["wrong"] = {name: list(wrong[:5]) for name, wrong in found.items() if wrong}
    shown["calls"] = statuses(entries)
    shown["longest_silence_s"] = longest_silence_s(entries)
    return shown
