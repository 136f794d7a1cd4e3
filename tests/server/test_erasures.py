"""Forgetting users over the wire: what is left of them where, who may ask, and what becomes of versions."""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from server import erasures
from server.application import Application
from server.engine import Engine
from tests.fakes import FakeEngine
from tests.finding import found, readers
from tests.publishing import Publisher
from tests.refusals import fields, refused
from tests.rows import finished_round
from tests.serving import Running, config_of, running, until
from thumbloop.client import AsyncClient
from thumbloop.config import ServerConfig, State
from thumbloop.errors import NotFound, PermissionDenied, StoreUnavailable
from thumbloop.store import (
    deployments,
    erasure,
    feedback,
    interactions,
    open_store,
    reading,
    scrubbing,
    versions,
)
from thumbloop.types import DEFAULT_POLICY, User, VersionState
from thumbloop.v1 import admin_pb2, feedback_pb2, policy_pb2

Delete = feedback_pb2.DeleteUserDataRequest
MARK = "xyzzyCANARYplugh"
ADMIN, BACKEND, RIVAL, SINGLE = "ops", "backend", "rival", "single"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no more erasures, and not long after a failure."""
    monkeypatch.setattr(erasures, "GATHER_S", 0.05)
    monkeypatch.setattr(erasures, "_RETRY_S", 0.05)


@pytest.mark.parametrize(("took_s", "rests_s"), [(0.0, 2.0), (0.1, 2.0), (1.5, 6.0), (60.0, 20.0)])
def test_who_erases_on_and_on_does_not_keep_writers_waiting_for_long(took_s, rests_s, monkeypatch):
    monkeypatch.setattr(erasures, "GATHER_S", 2.0)
    assert erasures.rest_s(took_s) == rests_s


async def test_files_are_left_alone_for_longer_where_to_rewrite_them_takes_longer(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    rewrite, spans = scrubbing.rewrite, []

    def slowly(*arguments: Any) -> Any:
        began = time.perf_counter()
        done = rewrite(*arguments)
        time.sleep(0.15)
        spans.append((began, time.perf_counter()))
        return done

    monkeypatch.setattr(scrubbing, "rewrite", slowly)
    for times in (1, 2):
        await server.generate("hello", user_id="ann")
        await server.feedback.DeleteUserData(Delete(user_id="ann"))
        await until(lambda times=times: len(spans) == times)
    assert spans[1][0] - spans[0][1] >= 4 * 0.15


@pytest.fixture
async def guarded(tiny_model: Path, state: State) -> AsyncIterator[Running]:
    """A server with an operator, two backends that speak for users, and one caller that speaks for itself."""
    scopes = {
        ADMIN: ["admin"],
        BACKEND: ["generate", "feedback", "on_behalf"],
        RIVAL: ["generate", "feedback", "on_behalf"],
        SINGLE: ["generate", "feedback"],
    }
    access = {
        "tokens": {
            subject: {"sha256": hashlib.sha256(subject.encode()).hexdigest(), "scopes": these}
            for subject, these in scopes.items()
        }
    }
    async with running(tiny_model, state, access=access) as server:
        yield server


def client(server: Running, subject: str) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{server.port}", token=subject)


async def talk(server: Running, user: str, mark: str) -> list[str]:
    """Have a user ask and rate in every way, with texts that hold the mark; return the reply's own texts, too."""
    names = {"user_id": user, "session_id": f"{mark} session", "request_id": f"{mark} request"}
    chat = policy_pb2.Chat(
        messages=[policy_pb2.ChatMessage(role=policy_pb2.ROLE_USER, content=f"{mark} in a chat")]
    )
    many = policy_pb2.GuidanceParams(num_candidates=16)
    asked = {"include_candidates": True, "guidance": many, **names}
    reply = await server.generate(f"{mark} and {mark}", **asked)
    await server.policy.Generate(policy_pb2.GenerateRequest(chat=chat, user_id=user))
    await server.client.rate(
        reply.response_id, up=True, user_id=user, comment=f"{mark}, I say", request_id=f"{mark} 1"
    )
    await server.client.rate(reply.response_id, up=False, user_id=user, request_id=f"{mark} 2")
    await server.client.prefer(reply.response_id, better=0, worse=1, user_id=user)
    return [mark, *(c.text for c in reply.candidates if len(c.text.strip()) >= 8)]


async def scrubbed(server: Running) -> None:
    """Wait until files hold nothing any more of what was erased."""
    assert server.database is not None
    database = server.database

    def is_scrubbed() -> bool:
        with reading(database) as connection:
            return erasure.unscrubbed(connection) is None

    await until(is_scrubbed, timeout_s=60)


async def test_nothing_of_a_user_is_left_in_any_file_within_a_minute_while_readers_are_active(
    server: Running, state: State, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    user = f"{MARK} user"
    texts = await talk(server, user, MARK)
    others = await talk(server, "bob", "somebody else entirely")
    assert len(texts) > 1
    assert "thumbloop.db-wal" in found(state.folder, MARK)
    store = open_store(state)
    with readers(store, 3, 0.3) as reads:
        answer = await server.client.forget(user)
        assert (answer.interactions_erased, answer.feedback_erased) == (2, 3)
        await scrubbed(server)
        assert await asyncio.to_thread(found, state.folder, *texts) == []
        before = reads[0]
        await until(lambda: reads[0] > before + 3)
    store.dispose()
    assert await asyncio.to_thread(found, state.folder, *others)
    assert not any(text in record.getMessage() for record in caplog.records for text in texts)
    assert "a user was forgotten: 2 replies" in caplog.text


async def test_who_is_forgotten_is_gone_and_others_are_not(server: Running):
    anns = await server.generate("hello", user_id="ann", request_id="once")
    bobs = await server.generate("hello", user_id="bob")
    await server.client.rate(bobs.response_id, up=True, user_id="bob", request_id="once")
    answer = await server.client.forget("ann")
    assert (answer.interactions_erased, answer.feedback_erased) == (1, 0)
    assert list(answer.tainted_policy_versions) == []
    assert answer.erased_at.ToSeconds() > 1_700_000_000
    with pytest.raises(NotFound):
        await server.client.rate(anns.response_id, up=True, user_id="ann")
    again = await server.generate("hello", user_id="ann", request_id="once")
    assert again.response_id != anns.response_id
    assert server.stored(bobs.response_id).user == User("", "bob")
    thumb = await server.client.rate(bobs.response_id, up=True, user_id="bob", request_id="once")
    assert thumb.duplicate


async def test_asked_again_there_is_nothing_to_forget(server: Running):
    await server.generate("hello", user_id="ann")
    await server.client.forget("ann")
    answer = await server.client.forget("ann")
    assert (answer.interactions_erased, answer.feedback_erased) == (0, 0)
    assert (await server.client.forget("nobody")).interactions_erased == 0


async def test_a_request_under_way_is_answered_and_its_row_comes_after(server: Running):
    server.engine.may_sample.clear()
    under_way = asyncio.create_task(server.generate("hello", user_id="ann"))
    await server.sampling(1)
    assert (await server.client.forget("ann")).interactions_erased == 0
    server.engine.may_sample.set()
    reply = await under_way
    assert server.stored(reply.response_id).user.user_id == "ann"
    assert (await server.client.forget("ann")).interactions_erased == 1


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Delete(), ["user_id"]),
        (Delete(user_id="u" * 257), ["user_id"]),
        (Delete(user_id="", subject="s" * 257), ["subject"]),
    ],
)
async def test_a_user_has_to_be_named(server: Running, request_: Delete, expected: list[str]):
    await server.generate("hello")
    assert fields(await refused(server.feedback.DeleteUserData(request_))) == expected
    assert (await server.client.forget("")).interactions_erased == 1


async def test_a_user_whose_names_are_too_long_cannot_be_traced(server: Running):
    wrong = admin_pb2.GetUserLineageRequest(user_id="u" * 257, subject="s" * 257)
    error = await refused(server.admin.GetUserLineage(wrong))
    assert sorted(fields(error)) == ["subject", "user_id"]
    unknown = admin_pb2.GetUserLineageRequest(policy="another")
    error = await refused(server.admin.GetUserLineage(unknown))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_each_forgets_whom_it_may(guarded: Running):
    async with (
        client(guarded, ADMIN) as ops,
        client(guarded, BACKEND) as backend,
        client(guarded, RIVAL) as rival,
        client(guarded, SINGLE) as single,
    ):
        for _ in range(2):
            await backend.generate("hello", user_id="ann")
        await rival.generate("hello", user_id="ann")
        await single.generate("hello")
        for stranger, user, subject in (
            (rival, "ann", BACKEND),
            (single, "ann", BACKEND),
            (single, "", BACKEND),
            (single, "ann", None),
            (backend, "", SINGLE),
        ):
            with pytest.raises(PermissionDenied):
                await stranger.forget(user, subject=subject)
        assert (await ops.forget("ann")).interactions_erased == 0  # whom it speaks for itself
        assert (await backend.forget("ann")).interactions_erased == 2
        assert (await ops.forget("ann", subject=RIVAL)).interactions_erased == 1
        assert (await single.forget("")).interactions_erased == 1
        with pytest.raises(PermissionDenied):
            await backend.trace("ann")
        assert not (await ops.trace("ann", subject=BACKEND)).learned
    assert guarded.database is not None
    with reading(guarded.database) as connection:
        assert interactions.count(connection, DEFAULT_POLICY) == 0
        events = deployments.list_events(connection, DEFAULT_POLICY)
    actors = [row["actor"] for row in events if row["kind"] == "erased"]
    assert actors == [BACKEND, ADMIN, "user"]


async def test_what_learned_from_a_user_is_named_and_shown_as_tainted(
    server: Running, publisher: Publisher
):
    reply = await server.generate("hello", user_id="ann")
    thumb = await server.client.rate(reply.response_id, up=True, user_id="ann")
    row = publisher.write(1)
    assert server.database is not None
    with server.database.begin() as connection:
        done = _round(row, new_feedback=(thumb.feedback_id,), rollouts=(reply.response_id,))
        versions.finish_round(connection, done, row)
    await server.serves(1)
    publisher.publish(2, 1)
    await server.serves(2)
    traced = await server.client.trace("ann")
    (learned,) = traced.learned
    assert (learned.policy_version, learned.thumbs, learned.replies) == (1, 1, 1)
    assert list(traced.descendants) == [2]
    answer = await server.client.forget("ann")
    assert list(answer.tainted_policy_versions) == [1, 2]
    listed = (await server.client.versions()).policy_versions
    assert {v.policy_version: v.is_tainted for v in listed} == {0: False, 1: True, 2: True}
    shown = await server.client.version(1)
    event = shown.events[-1]
    assert (event.state, event.actor) == (0, "operator")
    assert event.reason == "learned from data that was erased"
    assert not (await server.client.trace("ann")).learned
    assert (await server.generate("hello")).policy_version == 2  # which goes on serving


def _round(row: Any, **used: Any) -> Any:

    return finished_round(row.version, row.parent, round_id=row.round_id, **used)


async def test_a_version_shows_where_it_comes_from(server: Running, publisher: Publisher):
    assert server.database is not None
    first = publisher.write(1)
    with server.database.begin() as connection:
        versions.finish_round(
            connection, _round(first, new_feedback=(3, 9), rollouts=("a", "b", "c")), first
        )
    await server.serves(1)
    publisher.publish(2, 1)
    lineage = (await server.client.version(2)).lineage
    assert [step.policy_version for step in lineage.line] == [2, 1, 0]
    assert [step.reply_count for step in lineage.line] == [0, 3, 0]
    assert [step.feedback_count for step in lineage.line] == [1, 1, 0]
    assert lineage.line[1].round_id == first.round_id
    assert lineage.feedback_count == 2
    assert lineage.HasField("settings_json")
    base = (await server.client.version(0)).lineage
    assert [step.policy_version for step in base.line] == [0]
    assert not base.HasField("settings_json")


async def test_settings_are_absent_where_the_folder_is_gone(
    server: Running, publisher: Publisher, state: State
):
    row = publisher.publish(1)
    await server.serves(1)
    (state.versions / row.folder / "manifest.json").unlink()
    shown = await server.client.version(1)
    assert shown.lineage.line[0].state == admin_pb2.POLICY_VERSION_STATE_CURRENT
    assert not shown.lineage.HasField("settings_json")


# Files


async def test_what_a_killed_server_left_is_scrubbed_by_the_next(tiny_model: Path, state: State):
    async with running(tiny_model, state) as server:
        await talk(server, "ann", MARK)
    store = open_store(state)
    with store.begin() as connection:
        erasure.erase(connection, DEFAULT_POLICY, User("", "ann"), at=1.0, actor="operator")
    assert found(state.folder, MARK)  # nobody has the time to scrub
    async with running(tiny_model, state) as server:
        await scrubbed(server)
        assert await asyncio.to_thread(found, state.folder, MARK) == []
    store.dispose()


async def test_files_are_scrubbed_while_the_engine_starts(tiny_model: Path, state: State):
    async with running(tiny_model, state) as server:
        await talk(server, "ann", MARK)
    store = open_store(state)
    with store.begin() as connection:
        erasure.erase(connection, DEFAULT_POLICY, User("", "ann"), at=1.0, actor="operator")
    store.dispose()
    may_start = threading.Event()

    def start_slowly(folder: Path, _config: ServerConfig) -> Engine:
        may_start.wait(20)
        return FakeEngine(folder)

    application = Application(config_of(tiny_model, state), start_slowly)
    starting = asyncio.create_task(application.start())
    try:
        await until(lambda: not found(state.folder, MARK))
        assert not starting.done()
    finally:
        may_start.set()
        await starting
        await application.stop()


async def test_a_scrubbing_that_fails_is_tried_again(
    server: Running, state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    rewrite, tries = scrubbing.rewrite, [0]

    def fails_first(database: Any) -> None:
        tries[0] += 1
        if tries[0] < 3:
            raise StoreUnavailable("the store cannot be written: database or disk is full")
        rewrite(database)

    monkeypatch.setattr(scrubbing, "rewrite", fails_first)
    await talk(server, "ann", MARK)
    await server.client.forget("ann")
    await until(lambda: tries[0] >= 1)
    assert _unscrubbed(server) == 1
    await scrubbed(server)
    await until(lambda: _unscrubbed(server) == 0)
    assert tries[0] == 3
    assert await asyncio.to_thread(found, state.folder, MARK) == []
    assert "still in the store's files: the store cannot be written" in caplog.text


def _unscrubbed(server: Running) -> float | None:
    registry = server.application._metrics.registry
    return registry.get_sample_value("thumbloop_store_unscrubbed")


async def test_replies_and_thumbs_go_on_while_files_are_scrubbed_under_a_long_reader(
    server: Running, state: State
):
    store = open_store(state)
    await talk(server, "ann", MARK)
    with reading(store) as connection:
        assert interactions.count(connection, DEFAULT_POLICY)
        await server.client.forget("ann")
        for _ in range(5):
            reply = await server.generate("hello", user_id="bob")
            await server.client.rate(reply.response_id, up=True, user_id="bob")
            await asyncio.sleep(0.1)
        assert _unscrubbed(server) == 1
    await scrubbed(server)
    assert await asyncio.to_thread(found, state.folder, MARK) == []
    with reading(store) as connection:
        assert feedback.counts(connection) == (5, 5)
    store.dispose()


async def test_several_erasures_are_scrubbed_together(
    server: Running, state: State, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(erasures, "GATHER_S", 0.5)
    rewrite, rewritten = scrubbing.rewrite, [0]

    def counted(database: Any) -> None:
        rewritten[0] += 1
        rewrite(database)

    monkeypatch.setattr(scrubbing, "rewrite", counted)
    for user in ("ann", "bob", "cyd"):
        await talk(server, user, f"{MARK} {user}")
    for user in ("ann", "bob", "cyd"):
        await server.client.forget(user)
    await scrubbed(server)
    assert rewritten[0] == 1
    assert await asyncio.to_thread(found, state.folder, MARK) == []


def test_the_states_of_versions_are_no_kinds_of_erasure():
    assert {state.value for state in VersionState}.isdisjoint(
        {erasure.ERASED, erasure.SCRUBBED, versions.TAINTED}
    )
