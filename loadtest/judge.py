"""The judge of a journal: was every reply its version's own, and every thumb kept and learned once?

It reads what callers wrote down, and then the store, as those who test databases do: nothing that the
server says of itself counts.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import select

from loadtest.journal import OK, Entry
from thumbloop.config import State
from thumbloop.store import feedback, interactions, open_store, reading, versions
from thumbloop.store.schema import events as moves_table
from thumbloop.store.schema import feedback as events_table
from thumbloop.types import DEFAULT_POLICY, Interaction, VersionState

_EDGE_S = 1.0
"""A trial is routed by shortly before it is written down, or after."""


class Move(NamedTuple):
    """A version came into a state, unix seconds."""

    at: float
    state: str
    version: int


class Stored(NamedTuple):
    """What the store has: replies by id, effective thumbs and events of feedback by reply, which versions learned
    which thumbs, which are current, and how they came to be what they are."""

    replies: Mapping[str, Interaction]
    thumbs: Mapping[str, tuple[int, int]]
    events: Mapping[str, int]
    learned: Mapping[int, set[int]]
    parents: Mapping[int, int | None]
    currents: Sequence[int]
    moves: Sequence[Move]


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
            moves = connection.execute(
                select(moves_table.c.at, moves_table.c.kind, moves_table.c.version)
                .where(moves_table.c.kind.in_([state.value for state in VersionState]))
                .order_by(moves_table.c.id)
            )
            moved = [Move(*row) for row in moves]
    finally:
        database.dispose()
    return Stored(
        {reply.response_id: reply for reply in replies},
        {each.response_id: (each.feedback_id, each.value) for each in rated},
        dict(events),
        learned,
        {version.version: version.parent for version in known},
        [version.version for version in known if version.state is VersionState.CURRENT],
        moved,
    )


def answers(entries: Sequence[Entry]) -> list[Entry]:
    """Return the calls for replies that were answered, by whatever version answers."""
    return [entry for entry in entries if entry.kind == "generate" and entry.status == OK]


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
        key = _weights(version, sources), entry.prompt
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
            said[entry.prompt][_weights(version, sources)] = entry.what["text"]
    weights = len({each for replies in said.values() for each in replies})
    return sum(len(set(replies.values())) == weights > 1 for replies in said.values())


def _weights(version: int, sources: Mapping[int, str]) -> str:
    """Return the name of a version's weights: their source's, else its own."""
    return sources.get(version, str(version))


def unstored_replies(entries: Sequence[Entry], stored: Stored) -> list[str]:
    """Return the replies that somebody got and the store has not, or has otherwise."""
    wrong = []
    for entry in answers(entries):
        row = stored.replies.get(entry.what["response_id"])
        if row is None:
            wrong.append(f"{entry.what['response_id']} is not stored")
        elif (row.policy_version, row.chosen.text) != (entry.what["version"], _as_kept(entry)):
            wrong.append(f"{row.response_id} is stored as another reply")
        elif {c.policy_version for c in row.candidates} != {row.policy_version}:
            wrong.append(f"{row.response_id} has candidates of other versions")
    return wrong


def _as_kept(reply: Entry) -> str:
    """Return a reply's text as stores keep it: PostgreSQL takes no NUL, which a model may well say."""
    return str(reply.what["text"]).replace("\0", "\N{REPLACEMENT CHARACTER}")


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


def answered_after_rollback(entries: Sequence[Entry]) -> list[str]:
    """Return the replies to requests that began after the version that answered them had been taken back."""
    taken_back = {
        e.what["version"]: e.ended for e in entries if e.kind == "rollback" and e.status == OK
    }
    return [
        e.what["response_id"]
        for e in answers(entries)
        if e.began > taken_back.get(e.what["version"], math.inf)
    ]


def not_one_current(stored: Stored) -> list[str]:
    """Return what is wrong with who answers: exactly one version is current, and at most one on trial at any time."""
    wrong = [] if len(stored.currents) == 1 else [f"versions {stored.currents} are current"]
    trial: int | None = None
    for move in stored.moves:
        if move.state == VersionState.CANARY:
            if trial not in (None, move.version):
                wrong.append(f"version {move.version} went on trial beside {trial}")
            trial = move.version
        elif move.version == trial:
            trial = None
    return wrong


def users_on_both_sides(entries: Sequence[Entry], stored: Stored) -> list[str]:
    """Return the users who had a version on trial and another one while it was: sides are for a whole trial."""
    asked = [
        (entry, stored.replies[entry.what["response_id"]])
        for entry in answers(entries)
        if entry.what["response_id"] in stored.replies
    ]
    wrong = []
    for number, began, ended in trials(stored):
        sides: defaultdict[str, set[int]] = defaultdict(set)
        for entry, reply in asked:
            if began + _EDGE_S < entry.began and entry.ended < ended - _EDGE_S:
                sides[reply.user.user_id].add(reply.policy_version)
        wrong += [
            f"{user} had versions {sorted(had)} while {number} was on trial"
            for user, had in sides.items()
            if number in had and len(had) > 1
        ]
    return wrong


def trials(stored: Stored) -> list[tuple[int, float, float]]:
    """Return each trial's version, when it began and when it ended, unix seconds; infinity where it goes on.

    It ends when its version comes into another state, or any version becomes current.
    """
    return [
        (move.version, move.at, _end(move, stored.moves[i + 1 :]))
        for i, move in enumerate(stored.moves)
        if move.state == VersionState.CANARY
    ]


def _end(trial: Move, later: Sequence[Move]) -> float:
    ends = (
        move.at
        for move in later
        if move.version == trial.version or move.state == VersionState.CURRENT
    )
    return next(ends, math.inf)


def lost_moves(entries: Sequence[Entry], stored: Stored) -> list[str]:
    """Return the acknowledged moves of operators that the store knows nothing of."""
    states = {"promote": VersionState.CURRENT, "rollback": VersionState.ROLLED_BACK}
    made = {(move.version, move.state) for move in stored.moves}
    return [
        f"{entry.kind} of version {entry.what['version']}"
        for entry in entries
        if entry.kind in states and entry.status == OK
        if (entry.what["version"], states[entry.kind]) not in made
    ]


def first_replies(entries: Sequence[Entry]) -> dict[int, float]:
    """Return how long after its publication each version gave its first reply, seconds."""
    published = {e.what["version"]: e.ended for e in entries if e.kind == "publish"}
    answered: defaultdict[int, list[float]] = defaultdict(list)
    for entry in answers(entries):
        answered[entry.what["version"]].append(entry.ended)
    return {
        number: min(answered[number]) - at for number, at in published.items() if answered[number]
    }


def longest_silence_s(entries: Sequence[Entry]) -> float:
    """Return the longest time in which nobody was answered."""
    ends = sorted(e.ended for e in answers(entries))
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
        "answered_after_rollback": answered_after_rollback(entries),
        "not_one_current": not_one_current(stored),
        "lost_moves": lost_moves(entries, stored),
        "users_on_both_sides": users_on_both_sides(entries, stored),
    }
    shown: dict[str, Any] = {name: len(wrong) for name, wrong in found.items()}
    shown["wrong"] = {name: list(wrong[:5]) for name, wrong in found.items() if wrong}
    shown["calls"] = statuses(entries)
    shown["longest_silence_s"] = longest_silence_s(entries)
    return shown
