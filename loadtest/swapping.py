"""Versions to swap to while a load runs: copies of finished ones under new numbers."""

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from time import time
from types import TracebackType
from typing import Self
from uuid import uuid4

from thumbloop.artifacts import (
    MANIFEST,
    Lineage,
    Manifest,
    read_manifest,
    remove_unpublished,
    write_version,
)
from thumbloop.config import State
from thumbloop.errors import BadPolicyVersion
from thumbloop.leases import hold
from thumbloop.store import open_store, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion, Round, VersionState

_POLL_S = 0.05
_SWAP_TIMEOUT_S = 60.0
_UNDECIDED = (VersionState.PUBLISHED, VersionState.ATTESTED)


class NotTaken(Exception):
    """The server does not serve what was published to it; the message says what it made of it."""


class Swapping:
    """Publishes into a server's state folder, in the place of a trainer: none may run beside it."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._database = open_store(state)
        self._leases = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._leases.close()
        self._database.dispose()

    def trained(self) -> list[Path]:
        """Return the folders of the versions that learned something and are there still, oldest first; they stay."""
        with reading(self._database) as connection:
            known = versions.list_versions(connection, DEFAULT_POLICY)
        found = []
        for version in known:
            folder = self._state.versions / version.folder
            if version.policy_digest:
                with suppress(BadPolicyVersion):
                    self._leases.enter_context(hold(folder))
                    found.append(folder)
        return found

    def publish(self, source: Path) -> int:
        """Publish a copy of the version folder `source` as a child of the current version.

        Its probes come with it: the server attests the copy like any other version. Returns the
        new number. Raises BadPolicyVersion: the folder is no whole version.
        """
        manifest = read_manifest(source)
        with reading(self._database) as connection:
            known = versions.list_versions(connection, DEFAULT_POLICY)
            number = versions.next_number(connection, DEFAULT_POLICY)
            parent = versions.current(connection, DEFAULT_POLICY).version
        remove_unpublished(self._state.versions, DEFAULT_POLICY, [v.version for v in known])
        lineage = Lineage(round_id=str(uuid4()))  # it learned from nothing by itself
        changes = {"version": number, "parent": parent, "created_at": time(), "lineage": lineage}
        written = write_version(
            self._state.versions,
            DEFAULT_POLICY,
            number,
            lambda folder: _copy(source, folder, manifest.model_copy(update=changes)),
        )
        done = Round(
            round_id=lineage.round_id,
            policy=DEFAULT_POLICY,
            parent=parent,
            started_at=time(),
            finished_at=time(),
            version=number,
            reason="republished by a load test",
            metrics={},
        )
        with self._database.begin() as connection:
            versions.finish_round(connection, done, written.row())
        return number

    async def to(self, source: Path) -> int:
        """Publish a copy of a version and wait until the server serves it; return its number.

        Raises NotTaken.
        """
        number = await asyncio.to_thread(self.publish, source)
        version = await self.decided(number)
        if version.state is not VersionState.CURRENT:
            raise NotTaken(
                f"version {number}, a copy of {source}, is not served:"
                f" {version.state.value} {version.reason}".rstrip()
            )
        return number

    async def decided(self, number: int) -> PolicyVersion:
        """Wait until the server has decided about a version, for a minute at most; return it."""
        version = await asyncio.to_thread(self._get, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(_SWAP_TIMEOUT_S):
                while version.state in _UNDECIDED:
                    await asyncio.sleep(_POLL_S)
                    version = await asyncio.to_thread(self._get, number)
        return version

    def _get(self, number: int) -> PolicyVersion:
        with reading(self._database) as connection:
            version = versions.get(connection, DEFAULT_POLICY, number)
        assert version is not None, "it was published"
        return version

    @asynccontextmanager
    async def every(self, interval_s: float, sources: Sequence[Path]) -> AsyncIterator[None]:
        """Publish copies in turn, one each interval, until the block ends; what fails is raised then."""
        task = asyncio.create_task(self._publish_for_ever(interval_s, sources))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _publish_for_ever(self, interval_s: float, sources: Sequence[Path]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        for number, source in enumerate(itertools.cycle(sources)):
            await asyncio.to_thread(self.publish, source)
            await asyncio.sleep(max(0.0, started + (number + 1) * interval_s - loop.time()))


def _copy(source: Path, folder: Path, manifest: Manifest) -> Manifest:
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    return manifest
