"""What has to be true of a state folder at any moment, whoever was killed: in words where it is not.

Pure functions of what the store says and of the version folders; nothing is repaired.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from sqlalchemy import Connection, RowMapping, select

from thumbloop import artifacts
from thumbloop.config import State
from thumbloop.errors import BadPolicyVersion
from thumbloop.store import feedback, open_store, preferences, reading, schema, versions
from thumbloop.types import BASE_VERSION, DEFAULT_POLICY, WAITING, PolicyVersion, VersionState

Inputs = Mapping[str, Sequence[str]]
"""Rows that a round used, by their role."""


class Said(NamedTuple):
    """Feedback of one kind: what each row says, which rows are the last word, and the roles of learned ones."""

    kind: str
    new: str
    replayed: str
    rows: Mapping[str, tuple[str | int, ...]]
    effective: Set[str]


class Stored(NamedTuple):
    """What the store says of versions, rounds and feedback; rounds are known by their ids."""

    versions: Mapping[int, PolicyVersion]
    rounds: Mapping[str, RowMapping]
    inputs: Mapping[str, Inputs]
    feedback: Sequence[Said]
    current: Sequence[int]


def read(connection: Connection, policy: str) -> Stored:
    """Read a policy's versions, rounds and feedback in one transaction."""
    inputs: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in connection.execute(select(schema.round_inputs)):
        inputs[row.round_id][row.role].append(row.row)
    table = schema.deployments.c
    is_current = table.state == VersionState.CURRENT.value
    current = select(table.version).where(table.policy == policy, is_current)
    return Stored(
        versions={v.version: v for v in versions.list_versions(connection, policy)},
        rounds={row["round_id"]: row for row in versions.list_rounds(connection, policy)},
        inputs={round_id: dict(roles) for round_id, roles in inputs.items()},
        feedback=(_thumbs(connection), _preferences(connection, policy)),
        current=list(connection.scalars(current)),
    )


def _thumbs(connection: Connection) -> Said:
    rows = connection.execute(select(schema.feedback))
    return Said(
        kind="thumb",
        new="new",
        replayed="replay",
        rows={str(row.id): (row.response_id, row.value) for row in rows},
        effective={str(i) for i in connection.scalars(select(schema.thumbs.c.feedback_id))},
    )


def _preferences(connection: Connection, policy: str) -> Said:
    rows = connection.execute(select(schema.preferences))
    compared = preferences.list_compared(connection, policy)
    return Said(
        kind="preference",
        new="preference",
        replayed="old_preference",
        rows={str(row.id): (row.response_id, row.better, row.worse) for row in rows},
        effective={str(each.preference_id) for each in compared},
    )


class Outcome(NamedTuple):
    """What two state folders have in common whose trainers learned the same: all but times and random ids."""

    versions: tuple[Any, ...]
    rounds: tuple[Any, ...]
    current: tuple[int, ...]
    new_feedback: int


class Look(NamedTuple):
    """What is in a state folder, what of it is wrong, and what no row names."""

    outcome: Outcome
    wrong: list[str]
    leftovers: list[str]


def look(state: Path) -> Look:
    """Look at a copy of a state folder, so that whoever starts next finds it as it was left.

    A process that has the store open loses SQLite's locks on it, as they go when any file of it is closed.
    """
    with TemporaryDirectory(prefix="thumbloop-look-") as scratch:
        folder = State(folder=Path(scratch, "state"))
        shutil.copytree(state, folder.folder)
        engine = open_store(folder)
        try:
            with reading(engine) as connection:
                stored = read(connection, DEFAULT_POLICY)
                new = _count_new(connection, stored)
        finally:
            engine.dispose()
        return Look(
            outcome_of(stored, folder.versions, new),
            violations(stored, folder.versions),
            leftovers(stored, folder.versions, DEFAULT_POLICY),
        )


def outcome_of(stored: Stored, folder: Path, new_feedback: int) -> Outcome:
    """Return the outcome of all rounds so far."""
    return Outcome(
        versions=tuple(
            (number, v.parent, v.state.value, _files(folder / v.folder), dict(v.metrics))
            for number, v in stored.versions.items()
        ),
        rounds=tuple(
            (
                done["parent"],
                done["version"],
                done["reason"],
                dict(done["metrics"]),
                {role: sorted(rows) for role, rows in stored.inputs.get(round_id, {}).items()},
            )
            for round_id, done in stored.rounds.items()
        ),
        current=tuple(stored.current),
        new_feedback=new_feedback,
    )


def _count_new(connection: Connection, stored: Stored) -> int:
    """Return how many thumbs and preferences are new to the current version, where there is one."""
    rounds = [
        round_id
        for version in stored.current
        for round_id in versions.learned_by(connection, DEFAULT_POLICY, version)
    ]
    thumbs = feedback.count_new(connection, DEFAULT_POLICY, rounds)
    return thumbs.plus(preferences.count_new(connection, DEFAULT_POLICY, rounds)).usable


def _files(folder: Path) -> dict[str, str]:
    """Return the digests of a version's files; none where there is no whole version."""
    try:
        return artifacts.read_manifest(folder).files
    except BadPolicyVersion:
        return {}


def violations(stored: Stored, folder: Path) -> list[str]:
    """Return what is wrong with a store and its folder of versions.

    Supposes that nobody took anything back after it was learned from, as then it is no longer effective, and
    that nobody was forgotten.
    """
    return [
        *_of_current(stored),
        *_of_collected(stored),
        *_of_rounds(stored),
        *_of_inputs(stored),
        *_of_folders(stored, folder),
    ]


def leftovers(stored: Stored, folder: Path, policy: str) -> list[str]:
    """Return the folders that no row names: a killed trainer's or server's, which the next one has to remove."""
    named = {version.folder for version in stored.versions.values()}
    found = [p for p in (folder / policy).glob("*") if f"{policy}/{p.name}" not in named]
    return sorted(f"{p.name} is there, and no row names it" for p in found)


def _of_collected(stored: Stored) -> Iterator[str]:
    """A folder that was deleted is nobody's who answers or may."""
    for number, version in stored.versions.items():
        is_needed = version.state in (*WAITING, VersionState.CANARY, VersionState.CURRENT)
        if version.collected_at is not None and (is_needed or number == BASE_VERSION):
            yield f"version {number} is {version.state.value}, and its folder was deleted"


def _of_current(stored: Stored) -> Iterator[str]:
    if len(stored.current) != 1:
        yield f"{len(stored.current)} versions are current"
    for version in stored.current:
        if version not in stored.versions:
            yield f"version {version} is current and has no row"


def _of_rounds(stored: Stored) -> Iterator[str]:
    """Rounds, what they used and their versions are there together, or not at all."""
    for number, version in stored.versions.items():
        done = stored.rounds.get(version.round_id or "")
        if number == BASE_VERSION:
            continue
        if done is None:
            yield f"version {number} has no round"
        elif (done["version"], done["parent"]) != (number, version.parent):
            yield f"version {number} and its round differ in version or parent"
    for round_id, done in stored.rounds.items():
        number, inputs = done["version"], stored.inputs.get(round_id, {})
        published = stored.versions.get(number)
        if number is not None and (published is None or published.round_id != round_id):
            yield f"a round published version {number}, which is not its"
        learned = len(inputs.get("new", ())) + len(inputs.get("preference", ()))
        if not learned or not inputs.get("rollout"):
            yield f"a round from version {done['parent']} says nothing of what it used"
        if published is not None and published.feedback_count != learned:
            yield f"version {number} counts {published.feedback_count} of {learned} new inputs"
    for round_id in stored.inputs.keys() - stored.rounds.keys():
        yield f"inputs are there of a round {round_id}, which is not"


def _of_inputs(stored: Stored) -> Iterator[str]:
    """What a round used is new once in its line, whether the round was blocked or not; the rest is replayed."""
    for round_id, done in stored.rounds.items():
        inputs = stored.inputs.get(round_id, {})
        name = f"a round from version {done['parent']}"
        line = _line(stored, done["parent"])
        for said in stored.feedback:
            yield from (f"{name} {words}" for words in _of_feedback(said, inputs, line))
        tried = {row for each in line for row in each.get("rollout", ())}
        for row in tried & set(inputs.get("rollout", ())):
            yield f"{name} used the rollouts of {row}, which an ancestor had used"


def _of_feedback(said: Said, inputs: Inputs, line: Sequence[Inputs]) -> Iterator[str]:
    """What nobody in the line had learned is new, once; what somebody had is replayed."""
    learned = {said.rows.get(i) for each in line for i in each.get(said.new, ())}
    new = inputs.get(said.new, ())
    for row in new:
        if row not in said.effective:
            yield f"learned {row}, which is no effective {said.kind}"
        elif said.rows[row] in learned:
            yield f"learned {row} as new, a {said.kind} that an ancestor had learned"
    for row in inputs.get(said.replayed, ()):
        if said.rows.get(row) not in learned:
            yield f"replayed {row}, a {said.kind} that no ancestor had learned"
    for words, count in Counter(said.rows.get(i) for i in new).items():
        if count > 1:
            yield f"learned {words} {count} times as new, a {said.kind}"


def _line(stored: Stored, version: int) -> list[Inputs]:
    """Return what the rounds behind a version used: its own and those of all its ancestors."""
    line, ancestor = list[Inputs](), stored.versions.get(version)
    while ancestor is not None:
        line.append(stored.inputs.get(ancestor.round_id or "", {}))
        ancestor = stored.versions.get(ancestor.parent) if ancestor.parent is not None else None
    return line


def _of_folders(stored: Stored, folder: Path) -> Iterator[str]:
    """What a row names is there, whole, and is what the row says."""
    for number, version in stored.versions.items():
        place = folder / version.folder
        if number == BASE_VERSION and not place.exists():
            continue  # nobody trained it; whoever starts writes it
        if version.collected_at is not None and not place.exists():
            continue
        try:
            manifest = artifacts.read_manifest(place, version.manifest_digest or None)
            artifacts.verify_files(place, manifest)
        except BadPolicyVersion as error:
            yield f"version {number} is visible and does not verify: {error}"
            continue
        adapters = (manifest.policy_adapter, manifest.reward_adapter)
        digests = [facts.digest if facts else "" for facts in adapters]
        if (manifest.version, manifest.parent) != (number, version.parent):
            yield f"version {number} has the manifest of another"
        if digests != [version.policy_digest, version.reward_digest]:
            yield f"version {number} has other adapters than its row says"
        if manifest.lineage and manifest.lineage.round_id != version.round_id:
            yield f"version {number} has the manifest of another round"
