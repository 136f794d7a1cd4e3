"""The check of a state folder has to see every way in which one can be wrong: each is made here."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, insert, select, text, update

from experiments.consistency import look
from tests.bench import Bench
from tests.rows import finished_round, interaction, rated, version
from thumbloop import artifacts
from thumbloop.artifacts import MANIFEST
from thumbloop.store import deployments, feedback, interactions, preferences, schema, versions
from thumbloop.types import VersionState


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A state folder with a published round, a round after it with replay, and a rolled back one."""
    folder = tmp_path_factory.mktemp("learned")
    bench = Bench(folder, tiny_model)
    for current in (0, 1):
        bench.rate(40, version=current)
        bench.prefer(8)
        bench.loop.step()
        bench.adopt(current + 1)
    bench.adopt(1)
    bench.adopt(2, VersionState.ROLLED_BACK)
    bench.engine.dispose()
    return folder


@pytest.fixture
def bench(tmp_path: Path, learned: Path, tiny_model: Path) -> Bench:
    shutil.copytree(learned, tmp_path, dirs_exist_ok=True)
    return Bench(tmp_path, tiny_model)


def test_nothing_is_wrong_with_what_a_trainer_leaves(bench: Bench):
    found = look(bench.config.state.folder)
    assert (found.wrong, found.leftovers) == ([], [])
    assert (found.outcome.current, found.outcome.new_feedback) == ((1,), 48)
    assert [(parent, number) for parent, number, *_ in found.outcome.rounds] == [(0, 1), (1, 2)]
    first, second = (inputs for *_, inputs in found.outcome.rounds)
    assert (len(first["preference"]), len(second["preference"])) == (8, 8)
    assert set(second["old_preference"]) <= set(first["preference"])


def test_a_folder_that_was_deleted_is_missed_only_where_somebody_needs_it(bench: Bench):
    artifacts.set_aside(bench.config.state.versions, "default", 2)
    assert [words.partition(":")[0] for words in look(bench.config.state.folder).wrong] == [
        "version 2 is visible and does not verify"
    ]
    with bench.engine.begin() as connection:
        deployments.collect(connection, "default", 2, at=3.0, reason="")
    found = look(bench.config.state.folder)
    assert found.wrong == []
    assert found.leftovers == [".000002.collected is there, and no row names it"]
    with bench.engine.begin() as connection:
        deployments.collect(connection, "default", 1, at=3.0, reason="")
    wrong = look(bench.config.state.folder).wrong
    assert wrong == ["version 1 is current, and its folder was deleted"]


Change = Callable[[Connection], object]


def _row_without_a_folder(connection: Connection) -> None:
    done = finished_round(3, new_feedback=(1,), rollouts=("r",))
    versions.finish_round(connection, done, version(3, feedback_count=1))


def _inputs_of(connection: Connection, number: int, role: str) -> list[str]:
    table, rounds = schema.round_inputs, schema.rounds
    query = select(table.c.row).join(rounds, rounds.c.round_id == table.c.round_id)
    return list(connection.scalars(query.where(rounds.c.version == number, table.c.role == role)))


def _round_of(connection: Connection, number: int) -> str:
    query = select(schema.rounds.c.round_id).where(schema.rounds.c.version == number)
    return str(connection.execute(query).scalar_one())


def _again_as(role: str, of_version: int, of_role: str) -> Change:
    """Let version 2 use a row of a version again, as something else."""

    def change(connection: Connection) -> None:
        _use(connection, role, _inputs_of(connection, of_version, of_role)[0])

    return change


def _use(connection: Connection, role: str, row: str) -> None:
    """Let version 2 have used a row."""
    values = {"round_id": _round_of(connection, 2), "role": role, "row": row}
    connection.execute(insert(schema.round_inputs).values(**values))


def _feedback_nobody_gave(connection: Connection) -> None:
    connection.execute(
        update(schema.round_inputs)
        .where(
            schema.round_inputs.c.role == "new",
            schema.round_inputs.c.row == _inputs_of(connection, 2, "new")[0],
        )
        .values(row="4711")
    )


def _feedback_that_was_changed(connection: Connection) -> None:
    rated_id = int(_inputs_of(connection, 2, "new")[0])
    row = connection.execute(select(schema.feedback).where(schema.feedback.c.id == rated_id)).one()
    reply = interactions.get(connection, row.response_id)
    assert reply is not None
    feedback.submit_thumb(connection, row.response_id, 1 - row.value, reply.user, at=2.0)


def _replay_of_what_nobody_learned(connection: Connection) -> None:
    _, feedback_id = rated(connection)
    _use(connection, "replay", str(feedback_id))


def _replay_of_a_preference_that_nobody_learned(connection: Connection) -> None:
    reply = interaction()
    interactions.append(connection, reply)
    said = preferences.submit_preference(connection, reply.response_id, 1, 0, reply.user, at=2.0)
    _use(connection, "old_preference", str(said.preference_id))


def _preference_that_was_taken_back(connection: Connection) -> None:
    row = _inputs_of(connection, 2, "preference")[0]
    query = select(schema.preferences).where(schema.preferences.c.id == int(row))
    said = connection.execute(query).one()
    reply = interactions.get(connection, said.response_id)
    assert reply is not None
    preferences.submit_preference(
        connection, said.response_id, said.worse, said.better, reply.user, at=2.0
    )


def _said_again(table: str, role: str) -> Change:
    """Let version 2 use, beside what it learned, a second row that says the same."""
    rows = schema.metadata.tables[table]

    def change(connection: Connection) -> None:
        learned = int(_inputs_of(connection, 2, role)[0])
        row = connection.execute(select(rows).where(rows.c.id == learned)).mappings().one()
        again = insert(rows).values({**row, "id": None}).returning(rows.c.id)
        _use(connection, role, str(connection.execute(again).scalar_one()))

    return change


def _blocked_round_that_uses_up(connection: Connection) -> None:
    learned = _inputs_of(connection, 1, "new")
    done = finished_round(
        9, parent=1, version=None, new_feedback=tuple(map(int, learned)), rollouts=("r",)
    )
    versions.finish_round(connection, done, None)


def _blocked_round_that_uses_up_preferences(connection: Connection) -> None:
    learned = tuple(map(int, _inputs_of(connection, 1, "preference")))
    done = finished_round(9, parent=1, version=None, new_preferences=learned, rollouts=("r",))
    versions.finish_round(connection, done, None)


def _set(table: str, **values: object) -> Change:
    return lambda connection: connection.execute(
        update(schema.metadata.tables[table]).values(**values)
    )


def _of_version_2(table: str, **values: object) -> Change:
    rows = schema.metadata.tables[table]
    return lambda connection: connection.execute(
        update(rows).where(rows.c.version == 2).values(**values)
    )


def _without(table: str) -> Change:
    return lambda connection: connection.execute(delete(schema.metadata.tables[table]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_row_without_a_folder, "version 3 is visible and does not verify: manifest_missing"),
        (_of_version_2("policy_versions", manifest_digest="m" * 64), "manifest_altered"),
        (_of_version_2("policy_versions", policy_digest="p" * 64), "2 has other adapters than its"),
        (
            _of_version_2("policy_versions", parent=0),
            "version 2 and its round differ in version or",
        ),
        (_of_version_2("policy_versions", feedback_count=7), "version 2 counts 7 of 48 new inputs"),
        (_of_version_2("rounds", version=None), "version 2 and its round differ in version or p"),
        (_of_version_2("rounds", version=7), "a round published version 7, which is not its"),
        (_without("rounds"), "version 2 has no round"),
        (_without("rounds"), "inputs are there of a round"),
        (_without("round_inputs"), "a round from version 1 says nothing of what it used"),
        (_without("deployments"), "0 versions are current"),
        (_set("deployments", state="current"), "3 versions are current"),
        (_again_as("new", 1, "new"), "as new, a thumb that an ancestor had learned"),
        (_again_as("preference", 1, "preference"), "as new, a preference that an ancestor had"),
        (_again_as("rollout", 1, "rollout"), "which an ancestor had used"),
        (_blocked_round_that_uses_up, "as new, a thumb that an ancestor had learned"),
        (_blocked_round_that_uses_up_preferences, "as new, a preference that an ancestor had"),
        (_feedback_nobody_gave, "learned 4711, which is no effective thumb"),
        (_feedback_that_was_changed, "which is no effective thumb"),
        (_preference_that_was_taken_back, "which is no effective preference"),
        (_replay_of_what_nobody_learned, "a thumb that no ancestor had learned"),
        (_replay_of_a_preference_that_nobody_learned, "a preference that no ancestor had learned"),
        (_again_as("old_preference", 2, "preference"), "a preference that no ancestor had learned"),
        (_said_again("feedback", "new"), "2 times as new, a thumb"),
        (_said_again("preferences", "preference"), "2 times as new, a preference"),
    ],
)
def test_a_store_that_is_wrong_is_told(bench: Bench, change: Change, words: str):
    with bench.engine.connect() as connection:
        connection.connection.driver_connection.execute("PRAGMA foreign_keys = OFF")
        with connection.begin():
            change(connection)
        connection.invalidate()
    assert any(words in wrong for wrong in look(bench.config.state.folder).wrong)


def _lose_a_file(folder: Path) -> None:
    (folder / "value" / "value_head.safetensors").unlink()


def _alter_a_file(folder: Path) -> None:
    path = folder / "policy" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def _swap(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("000001"), folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_lose_a_file, "version 2 is visible and does not verify: file_missing"),
        (_alter_a_file, "version 2 is visible and does not verify: file_altered"),
        (_swap, "version 2 is visible and does not verify: manifest_altered"),
        (shutil.rmtree, "version 2 is visible and does not verify: manifest_missing"),
    ],
)
def test_a_folder_that_is_wrong_is_told(bench: Bench, damage: Callable[[Path], None], words: str):
    damage(bench.config.state.versions / "default" / "000002")
    assert any(words in wrong for wrong in look(bench.config.state.folder).wrong)


def test_a_manifest_of_another_version_is_told(bench: Bench):
    _swap(bench.config.state.versions / "default" / "000002")
    with bench.engine.begin() as connection:
        digest = connection.scalar(
            text("SELECT manifest_digest FROM policy_versions WHERE version=1")
        )
        connection.execute(
            update(schema.policy_versions)
            .where(schema.policy_versions.c.version == 2)
            .values(manifest_digest=digest)
        )
    wrong = look(bench.config.state.folder).wrong
    assert "version 2 has the manifest of another" in wrong
    assert "version 2 has the manifest of another round" in wrong


def test_folders_that_no_row_names_are_told(bench: Bench):
    default = bench.config.state.versions / "default"
    (default / "000003").mkdir()
    (default / ".000003.77.tmp").mkdir()
    (default / ".000003.77.tmp" / MANIFEST).write_text("{")
    found = look(bench.config.state.folder)
    assert found.wrong == []
    assert found.leftovers == [
        ".000003.77.tmp is there, and no row names it",
        "000003 is there, and no row names it",
    ]
