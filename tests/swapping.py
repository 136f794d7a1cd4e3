"""A swapper on a fake engine and a real store; a second one on the same store is a restart."""

import asyncio

from sqlalchemy import Engine as Database

from server.delivery import Move
from server.hotswap import Swapper
from server.ledger import Ledger
from server.loading import Loader
from server.performing import Swap
from server.routes import Routes
from server.verification import Expected
from tests.fakes import FakeEngine
from thumbloop.config import State
from thumbloop.config.delivery import Delivery
from thumbloop.store import GroupWriter, reading, versions
from thumbloop.types import DEFAULT_POLICY, PolicyVersion

QUICK = Delivery(poll_interval_s=0.01, drain_timeout_s=0.05)
PROMPT = (40, 41)


def roll_back(to: int | None, expected: int) -> Move:
    return Move(to, expected, is_rollback=True, reason="it swears", actor="ann")


def promote(to: int, expected: int) -> Move:
    return Move(to, expected, is_rollback=False, reason="", actor="ann")


class Server:
    """A swapper with what it works on; a second one on the same store is a restart."""

    def __init__(
        self,
        engine: FakeEngine,
        database: Database,
        writer: GroupWriter,
        state: State,
        expected: Expected,
        max_versions: int = 5,
        settings: Delivery = QUICK,
    ) -> None:
        self.engine = engine
        self.routes = Routes()
        self.swaps: list[Swap] = []
        self.writer = writer
        self._database = database
        self.ledger = Ledger(database, writer)
        self.loader = Loader(
            engine, self.routes, state.versions, expected, QUICK, max_versions=max_versions
        )
        self.swapper = Swapper(
            self.loader,
            self.routes,
            self.ledger,
            state.versions,
            settings,
            max_versions=max_versions,
            on_swap=self.swaps.append,
        )

    async def settle(self, steps: int = 4) -> None:
        """Step until nothing is left to do, with time for what drains."""
        for _ in range(steps):
            await self.swapper.step()
            await asyncio.sleep(0.02)

    def rows(self) -> dict[int, PolicyVersion]:
        with reading(self._database) as connection:
            return {v.version: v for v in versions.list_versions(connection, DEFAULT_POLICY)}

    def states(self) -> dict[int, str]:
        return {number: row.state.value for number, row in self.rows().items()}

    def held(self) -> list[str]:
        return sorted(adapter.name for adapter in self.engine.loaded.values())
