"""The whole loop: real server, real trainer, users who rate; every new version is examined."""

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine as Database

from demo.base_model import build, default_folder
from demo.corpus import held_out_prompts, train_prompts
from demo.evaluation import Examiner
from demo.grammar import is_well_formed
from demo.ledger import Ledger
from demo.memory import peak_memory
from demo.preferences import load_preference
from demo.report import Run, make_report, read_store, version_rows
from demo.settings import Options, has_chat_template, server_settings, trainer_settings
from demo.speaker import Speaker
from demo.swaps import watch_swaps
from demo.users import Crowd, Users
from thumbloop.base_model import locate
from thumbloop.client import AsyncClient
from thumbloop.config import Model, State
from thumbloop.errors import SettingsError
from thumbloop.processes import Process, ProcessFailed
from thumbloop.store import open_store, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion

_POLL_S = 0.5
_PROMPTS = 5000
MARKER = ".thumbloop-demo"
"""Says that a folder is a run of the demo, to be replaced by the next."""

Show = Callable[[list[dict[str, Any]], str], None]


def base_model(options: Options, on_progress: Callable[[Any], None]) -> Path:
    """Return the folder of the model to serve: the one that was named, or the demo's own."""
    if options.model is not None:
        return locate(Model(path=options.model))
    return build(default_folder(), on_progress=on_progress)


async def run_loop(options: Options, model: Path, show: Show) -> dict[str, Any]:
    """Serve, rate, learn and swap until enough versions are examined; return the report.

    Raises ProcessFailed: the server or the trainer ended by itself.
    """
    preference = load_preference(options.preference)
    empty(options.folder)
    database = open_store(State(folder=options.folder / "state"))
    with _process("server", server_settings(options, model), options.folder) as server:
        show([], "starting the server")
        port, _ = await server.serving_ports()
        with _process("trainer", trainer_settings(options, model), options.folder) as trainer:
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                speaker = Speaker(client, is_text=not has_chat_template(model))
                ledger = Ledger()
                run = Run(options.preference, options.seed, options.shuffled, ledger, time.time())
                prompts = train_prompts(_PROMPTS, options.seed)
                users = Users(
                    speaker,
                    prompts,
                    preference,
                    Crowd(),
                    ledger,
                    seed=options.seed,
                    shuffled=options.shuffled,
                )
                formed = is_well_formed if options.model is None else None
                held_out = held_out_prompts(options.held_out, options.seed)
                examiner = Examiner(speaker, held_out, preference, formed, ledger)
                follow = _follow(options, run, examiner, database, server, trainer, show)
                watch = watch_swaps(speaker, prompts[0], ledger, lambda: _highest(database))
                memory = peak_memory((server, trainer), run.memory)
                await _until_done(follow, users.visit(), memory, watch)
                await users.leave()
                trainer.stop()
                last = max(run.evaluations)
                show(version_rows(run, database), f"examining version {last} with guidance")
                if (guided := await examiner.guided(last)) is not None:
                    run.guided[last] = guided
                return make_report(run, read_store(database), time.time())


def empty(folder: Path) -> None:
    """Make a fresh folder, taking the place of an earlier run's.

    Raises SettingsError: it holds something that no demo wrote, which is left alone.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise SettingsError(
            f"--folder: {folder} holds no run of the demo; give a new or an empty one"
        )
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
    except OSError as error:
        raise SettingsError(f"--folder: {folder} cannot be written: {error.strerror}") from None


@contextmanager
def _process(name: str, settings: dict[str, Any], folder: Path) -> Iterator[Process]:
    process = Process.of_application(name, settings, folder)
    try:
        yield process
    finally:
        process.stop()


async def _until_done(main: Any, *others: Any) -> None:
    """Run the others beside `main` and end them with it."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in (main, *others)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(
    options: Options,
    run: Run,
    examiner: Examiner,
    database: Database,
    server: Process,
    trainer: Process,
    show: Show,
) -> None:
    """Examine each version once users have met it, until there are enough or time is up.

    The trainer is stopped then: where it learns faster than versions are examined, the current one would
    always be another.
    """
    examining: asyncio.Task[None] | None = None
    is_learning = True
    while True:
        server.check()
        if is_learning:
            trainer.check()
        rows = version_rows(run, database)
        show(rows, _caption(options, run))
        if examining is not None and examining.done():
            examining.result()
            examining = None
        current = max(v["policy_version"] for v in rows if v["state"] == "current")
        is_late = _minutes(run) > options.max_minutes
        if is_late and not run.evaluations and examining is None:
            raise ProcessFailed(
                f"no version was examined in {options.max_minutes:g} minutes ({_last_failure(run)});"
                " MINUTES= gives it more"
            )
        enough = current >= options.rounds or is_late
        if is_learning and enough:
            await asyncio.to_thread(trainer.stop)
            is_learning = False
        if examining is None:
            is_examined = current in run.evaluations
            if not is_examined and run.ledger.first_reply_at(current) is not None:
                examining = asyncio.create_task(_examine(examiner, run, current))
            elif (is_examined and enough) or (is_late and run.evaluations):
                return
        await asyncio.sleep(_POLL_S)


async def _examine(examiner: Examiner, run: Run, version: int) -> None:
    evaluation = await examiner.policy(version)
    if evaluation is not None:  # else failures were counted, and it is examined again
        run.evaluations[version] = evaluation


def _highest(database: Database) -> PolicyVersion:
    """Return the newest version that was published."""
    with reading(database) as connection:
        return versions.list_versions(connection, DEFAULT_POLICY)[-1]


def _last_failure(run: Run) -> str:
    """Return the words of the last request that failed, or how many were answered."""
    if run.ledger.failed:
        return run.ledger.failed[-1][1]
    return f"{len(run.ledger.served)} replies were served"


def _minutes(run: Run) -> float:
    return (time.time() - run.started_at) / 60


def _caption(options: Options, run: Run) -> str:
    ledger = run.ledger
    return (
        f"{_minutes(run):.1f} min · {ledger.requests} requests, {len(ledger.failed)} failed"
        f" · {len(ledger.acknowledged)} thumbs · preference {options.preference}"
        + (" · thumbs shuffled" if options.shuffled else "")
    )
