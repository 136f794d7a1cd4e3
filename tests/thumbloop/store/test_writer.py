import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DatabaseError, InternalError, OperationalError

from tests.rows import ANN, interaction
from thumbloop.config import State
from thumbloop.errors import StoreUnavailable, UnknownResponse
from thumbloop.store import (
    GroupWriter,
    deployments,
    feedback,
    interactions,
    open_store,
    reading,
)
from thumbloop.types import DEFAULT_POLICY, VersionState


class Commits:
    """Remembers how many changes each commit held."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, changes: int, seconds: float) -> None:
        assert seconds >= 0
        self.sizes.append(changes)


@pytest.fixture
def commits() -> Commits:
    return Commits()


@pytest.fixture
def writer(store: Engine, commits: Commits) -> Iterator[GroupWriter]:
    writer = GroupWriter(store, on_commit=commits)
    yield writer
    writer.close()


def append(response_id: str):
    def change(connection: Connection) -> str:
        interactions.append(connection, interaction(response_id))
        return response_id

    return change


def stored(store: Engine) -> list[str]:
    with reading(store) as connection:
        rows = connection.scalars(text("SELECT response_id FROM interactions"))
        return sorted(rows)


class Gate:
    """A change that holds the writer until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, _connection: Connection) -> None:
        self.entered.set()
        assert self.opened.wait(10)


def test_a_result_comes_when_the_change_is_durable(store: Engine, writer: GroupWriter):
    assert writer.submit(append("one")).result(10) == "one"
    assert stored(store) == ["one"]


def test_changes_that_wait_share_one_commit(store: Engine, writer: GroupWriter, commits: Commits):
    gate = Gate()
    writer.submit(gate)
    assert gate.entered.wait(10)
    futures = [writer.submit(append(f"r{i}")) for i in range(20)]
    assert writer.waiting == 20
    gate.opened.set()
    assert [f.result(10) for f in futures] == [f"r{i}" for i in range(20)]
    assert commits.sizes == [1, 20]
    assert writer.waiting == 0


def test_no_result_is_delivered_before_its_commit(store: Engine, writer: GroupWriter):
    hold, gate = Gate(), Gate()
    writer.submit(hold)
    assert hold.entered.wait(10)
    early = writer.submit(append("early"))
    writer.submit(gate)  # in the same group, behind `early`
    hold.opened.set()
    assert gate.entered.wait(10)
    assert not early.done()
    assert stored(store) == []
    gate.opened.set()
    assert early.result(10) == "early"


def test_a_group_has_a_largest_size(store: Engine):
    commits = Commits()
    writer = GroupWriter(store, max_group=3, on_commit=commits)
    gate = Gate()
    writer.submit(gate)
    assert gate.entered.wait(10)
    futures = [writer.submit(append(f"r{i}")) for i in range(7)]
    gate.opened.set()
    for future in futures:
        future.result(10)
    writer.close()
    assert commits.sizes == [1, 3, 3, 1]


def half_done(connection: Connection) -> None:
    interactions.append(connection, interaction("half"))
    raise UnknownResponse("no such reply")


def test_a_change_that_fails_alone_leaves_nothing(store: Engine, writer: GroupWriter):
    with pytest.raises(UnknownResponse):
        writer.submit(half_done).result(10)
    assert stored(store) == []
    assert writer.submit(append("after")).result(10) == "after"


def test_a_store_that_fails_is_unavailable_also_to_a_lone_change(
    store: Engine, writer: GroupWriter
):
    def damaged(_connection: Connection) -> None:
        raise DatabaseError("BEGIN", None, Exception("the disk image is malformed"))

    event.listen(store, "begin", damaged)
    with pytest.raises(StoreUnavailable, match="malformed"):
        writer.submit(append("lost")).result(10)
    event.remove(store, "begin", damaged)
    assert writer.submit(append("after")).result(10) == "after"


@pytest.mark.parametrize(
    ("sqlstate", "expected"), [("25006", StoreUnavailable), ("25P02", InternalError)]
)
def test_a_database_that_became_read_only_is_unavailable_and_a_fault_of_ours_is_not(
    writer: GroupWriter, sqlstate: str, expected: type[Exception]
):
    reason = Exception("refused")
    reason.sqlstate = sqlstate

    def refused(_connection: Connection) -> None:
        raise InternalError("INSERT", {}, reason)

    with pytest.raises(expected, match="refused"):
        writer.submit(refused).result(10)


def test_a_change_that_fails_costs_its_group_nothing(store: Engine, writer: GroupWriter):
    gate = Gate()
    writer.submit(gate)
    assert gate.entered.wait(10)
    before, failing, after = map(writer.submit, (append("before"), half_done, append("after")))
    gate.opened.set()
    assert before.result(10) == "before"
    assert after.result(10) == "after"
    with pytest.raises(UnknownResponse):
        failing.result(10)
    assert stored(store) == ["after", "before"]


def test_commits_that_fail_are_told_and_changes_that_fail_are_not(store: Engine):
    errors: list[int] = []
    writer = GroupWriter(store, on_error=lambda: errors.append(1))
    with pytest.raises(UnknownResponse):
        writer.submit(half_done).result(20)
    assert errors == []

    def damaged(_connection: Connection) -> None:
        raise OperationalError("COMMIT", None, Exception("database or disk is full"))

    with pytest.raises(StoreUnavailable):
        writer.submit(damaged).result(20)
    assert errors == [1]
    writer.close()


@pytest.mark.sqlite
def test_a_locked_database_is_unavailable_and_recovers(state: State, store: Engine):
    impatient = open_store(state)
    with impatient.connect() as connection:
        connection.connection.driver_connection.execute("PRAGMA busy_timeout=50")
    writer = GroupWriter(impatient)
    another_process = store.connect()
    with another_process, another_process.begin():
        blocked = writer.submit(append("blocked"))
        with pytest.raises(StoreUnavailable, match="did not take the write"):
            blocked.result(20)
    assert writer.submit(append("later")).result(10) == "later"
    writer.close()
    impatient.dispose()
    assert stored(store) == ["later"]


async def test_waiting_for_the_store_does_not_block_the_event_loop(writer: GroupWriter):
    gate = Gate()
    waiting = asyncio.create_task(writer.run(gate))
    ticks = 0
    assert await asyncio.to_thread(gate.entered.wait, 10)
    for _ in range(20):
        await asyncio.sleep(0.001)
        ticks += 1
    assert ticks == 20
    assert not waiting.done()
    gate.opened.set()
    await waiting


async def test_a_caller_that_gives_up_does_not_undo_its_change(store: Engine, writer: GroupWriter):
    gate = Gate()
    writer.submit(gate)
    task = asyncio.create_task(writer.run(append("unloved")))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    assert await writer.run(append("next")) == "next"
    assert stored(store) == ["next", "unloved"]


async def test_a_change_that_is_started_is_made_whether_anybody_awaits_it_or_not(
    store: Engine, writer: GroupWriter
):
    writer.start(append("forgotten"))
    assert await writer.start(append("awaited")) == "awaited"
    assert stored(store) == ["awaited", "forgotten"]
    with pytest.raises(UnknownResponse):
        await writer.start(lambda c: feedback.submit_thumb(c, "none", 1, ANN, at=1.0))


def test_a_cancelled_future_does_not_stop_the_writer(store: Engine, writer: GroupWriter):
    gate = Gate()
    writer.submit(gate)
    assert gate.entered.wait(10)
    writer.submit(append("cancelled")).cancel()
    gate.opened.set()
    assert writer.submit(append("next")).result(10) == "next"


def test_closing_commits_what_is_queued_and_takes_no_more(store: Engine):
    writer = GroupWriter(store, max_group=4)
    gate = Gate()
    writer.submit(gate)
    assert gate.entered.wait(10)
    futures = [writer.submit(append(f"r{i}")) for i in range(10)]
    threading.Timer(0.05, gate.opened.set).start()
    writer.close()
    assert all(f.done() for f in futures)
    assert len(stored(store)) == 10
    with pytest.raises(StoreUnavailable, match="closed"):
        writer.submit(append("late"))
    writer.close()


def test_many_threads_lose_nothing(store: Engine, writer: GroupWriter):
    def rate(user: int) -> None:
        for i in range(10):
            writer.submit(append(f"{user}-{i}")).result(10)
            writer.submit(
                lambda c, i=i: feedback.submit_thumb(c, f"{user}-{i}", 1, ANN, at=1.0)
            ).result(10)

    threads = [threading.Thread(target=rate, args=(user,)) for user in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(store) as connection:
        assert feedback.counts(connection) == (80, 80)


def url_of(store: Engine) -> str:
    return store.url.render_as_string(hide_password=False)


def test_a_reader_in_another_process_sees_a_version_the_moment_it_is_current(
    state: State, store: Engine, writer: GroupWriter
):
    writer.submit(
        lambda c: deployments.set_state(c, DEFAULT_POLICY, 0, VersionState.CURRENT, at=3.0)
    ).result(10)
    code = (
        "import sys; from pathlib import Path; from thumbloop.config import State;"
        "from thumbloop.store import open_store, reading, versions;"
        "store = open_store(State(folder=Path(sys.argv[1]), url=sys.argv[2]));"
        "c = store.connect(); print(versions.current(c, 'default').state_since)"
    )
    command = [sys.executable, "-c", code, str(state.folder), url_of(store)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "3.0\n"


_RATES_UNTIL_KILLED = """
import sys
from pathlib import Path
from tests.rows import ANN, interaction
from thumbloop.config import State
from thumbloop.store import GroupWriter, feedback, interactions, open_store

writer = GroupWriter(open_store(State(folder=Path(sys.argv[1]), url=sys.argv[2])))
for i in range(100_000):
    reply = f"{sys.argv[3]}-{i}"
    writer.submit(lambda c: interactions.append(c, interaction(reply))).result()
    writer.submit(lambda c: feedback.submit_thumb(c, reply, 1, ANN, at=1.0)).result()
    print(reply, flush=True)  # the acknowledgement
"""


@pytest.mark.parametrize("attempt", range(2))
def test_kill_9_loses_no_thumb_that_was_acknowledged(state: State, store: Engine, attempt: int):
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", _RATES_UNTIL_KILLED),
            *(str(state.folder), url_of(store), str(attempt)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip()]
    time.sleep(0.05 * (attempt + 1))
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += process.stdout.read().split()
    process.wait()
    process.stdout.close()
    with reading(store) as connection:
        rated = [r.response_id for r in feedback.list_rated(connection, DEFAULT_POLICY)]
        if store.dialect.name == "sqlite":
            assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
    assert len(rated) == len(set(rated))
    assert set(acknowledged) <= set(rated)
    assert len(set(rated) - set(acknowledged)) <= 1  # one was durable, its answer was not yet out


async def test_who_needs_the_database_alone_gets_it_between_commits(store: Engine):
    commits, order = Commits(), list[str]()
    writer = GroupWriter(store, on_commit=commits)
    may_go = threading.Event()

    def change(name: str) -> Callable[[Connection], None]:
        def write(connection: Connection) -> None:
            assert connection.in_transaction()
            may_go.wait()
            order.append(name)

        return write

    def job(engine: Engine) -> str:
        assert engine is store
        with engine.begin() as connection:  # nobody else is in a transaction that writes
            connection.execute(text("UPDATE deployments SET reason = 'alone'"))
        order.append("alone")
        return "done"

    before = [writer.start(change("1")), writer.start(change("2"))]
    alone = asyncio.create_task(writer.run_alone(job))
    await asyncio.sleep(0)
    after = [writer.start(change("3")), writer.start(change("4"))]
    may_go.set()
    assert await alone == "done"
    await asyncio.gather(*before, *after)
    assert order == ["1", "2", "alone", "3", "4"]
    assert sum(commits.sizes) == 4  # a job is no commit
    writer.close()


async def test_what_a_lone_job_raises_reaches_whoever_waits_and_nobody_else(store: Engine):
    writer = GroupWriter(store)

    def fails(_engine: Engine) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await writer.run_alone(fails)
    await writer.run(lambda connection: interactions.append(connection, interaction()))
    writer.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await writer.run_alone(fails)


def test_a_writer_that_is_closed_does_what_is_queued_alone_too(store: Engine):
    writer = GroupWriter(store)
    done: list[int] = []
    for number in range(3):
        writer.submit(lambda _connection, n=number: done.append(n))
        writer._put(lambda _engine, n=number: done.append(10 + n), is_alone=True)
    writer.close()
    assert done == [0, 10, 1, 11, 2, 12]
