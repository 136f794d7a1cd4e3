"""Folders of versions that nobody needs, deleted: the mark in the store first, then the folder, all at once.

A crash between any two steps is made good by the next look.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from server.ledger import Ledger
from server.references import collectable
from thumbloop import artifacts
from thumbloop.errors import BadPolicyVersion, Overloaded, StoreUnavailable, VersionConflict
from thumbloop.leases import claim
from thumbloop.types import DEFAULT_POLICY, PolicyVersion

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0


class Collector:
    """Looks now and then which folders may go; `held` says what this server uses.

    `on_collected` hears of each folder that was deleted, and of its size in bytes.
    """

    def __init__(
        self,
        ledger: Ledger,
        held: Callable[[], Collection[int]],
        folder: Path,
        keep: int,
        *,
        on_collected: Callable[[int], None] = lambda _size_bytes: None,
    ) -> None:
        self._ledger = ledger
        self._held = held
        self._folder = folder
        self._keep = keep
        self._on_collected = on_collected

    async def watch(self) -> None:
        """Collect until cancelled; what cannot be done now is tried again."""
        while True:
            try:
                await self.collect()
            except (StoreUnavailable, Overloaded) as error:
                log.warning("%s; trying again", error)
            await asyncio.sleep(_INTERVAL_S)

    async def collect(self) -> None:
        """Delete what may go now, and what a crash left of what was about to. Raises StoreUnavailable, Overloaded."""
        await asyncio.to_thread(artifacts.sweep, self._folder, DEFAULT_POLICY)
        rows = await self._ledger.rows()
        begun = [v for v in rows if v.collected_at is not None]
        for version in await asyncio.to_thread(self._left, begun):
            await self._delete(version)
        for version in collectable(rows, held=self._held(), keep=self._keep):
            await self._delete(version)

    def _left(self, begun: list[PolicyVersion]) -> list[PolicyVersion]:
        return [v for v in begun if self._place(v).is_dir()]

    def _settings(self, version: PolicyVersion) -> Mapping[str, Any] | None:
        with suppress(BadPolicyVersion):
            return artifacts.read_manifest(self._place(version), version.manifest_digest).settings
        return None

    def _place(self, version: PolicyVersion) -> Path:
        return self._folder / artifacts.folder_of(version.policy, version.version)

    async def _delete(self, version: PolicyVersion) -> None:
        """Delete one folder, unless somebody uses it or the store says otherwise by now."""
        try:
            with claim(self._place(version)) as is_ours:
                if not is_ours:
                    return  # a trainer's parent, or in another server's engine
                if version.collected_at is None:
                    settings = await asyncio.to_thread(self._settings, version)
                    await self._ledger.collect(
                        version, held=self._held(), keep=self._keep, settings=settings
                    )
                size_bytes = await asyncio.to_thread(
                    artifacts.set_aside, self._folder, version.policy, version.version
                )
            await asyncio.to_thread(artifacts.sweep, self._folder, version.policy)
        except VersionConflict as error:
            log.info("the folder of version %d stays: %s", version.version, error)
        except OSError as error:
            log.warning("the folder of version %d cannot be deleted: %s", version.version, error)
        else:
            log.info("the folder of version %d is deleted, %d bytes", version.version, size_bytes)
            self._on_collected(size_bytes)
