"""Which loaded versions answer now, and how many requests each still has in flight."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.canary import Canary
from server.delivery import Routed
from server.engine import Adapter
from thumbloop.errors import EngineUnavailable, PolicyVersionUnavailable, UnknownPolicyVersion
from thumbloop.types import PolicyVersion


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A version in the engine. `reward` is None for the base model, which has no opinion."""

    facts: PolicyVersion
    policy: Adapter
    reward: Adapter | None

    @property
    def number(self) -> int:
        """Return the version's number."""
        return self.facts.version

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Return what the engine holds of it."""
        return (self.policy,) if self.reward is None else (self.policy, self.reward)


class Routes:
    """The one place that says where a request goes. Lives on the event loop; never blocks."""

    def __init__(self) -> None:
        self._loaded: dict[int, LoadedVersion] = {}
        self._in_flight: dict[int, int] = {}
        self._current: int | None = None
        self._canary: Canary | None = None
        self._highest = 0

    @property
    def current(self) -> LoadedVersion:
        """Return the version that answers. Raises EngineUnavailable: none is loaded yet."""
        if self._current is None:
            raise EngineUnavailable("the server is starting; try again in a moment")
        return self._loaded[self._current]

    @property
    def routed(self) -> Routed:
        """Return the numbers of the versions that answer."""
        canary = self._canary  # once: other threads ask, too
        return Routed(self._current, canary.version if canary else None)

    def current_or_nan(self) -> float:
        """Return the current version's number for a gauge; NaN while there is none."""
        current = self._current
        return float("nan") if current is None else current

    @property
    def loaded(self) -> tuple[int, ...]:
        """Return the numbers of the versions that a request may be pinned to."""
        return tuple(sorted(self._loaded))

    @property
    def held(self) -> tuple[LoadedVersion, ...]:
        """Return the versions that a request may be pinned to; for any thread."""
        return tuple(self._loaded.values())

    def find(self, number: int) -> LoadedVersion | None:
        """Return a version that a request may be pinned to; None: it is not loaded."""
        return self._loaded.get(number)

    def state_of(self, number: int) -> str:
        """Say where a version is, in one word: current, canary, held (for pins), or gone; for any thread."""
        routed = self.routed
        if number == routed.current:
            return "current"
        if number == routed.canary:
            return "canary"
        return "held" if number in self._loaded else "gone"

    def know(self, highest: int) -> None:
        """Hear of the highest version in the store, so that a pin to it is answered rightly."""
        self._highest = highest

    def add(self, version: LoadedVersion) -> None:
        """Make a version available for pinned requests."""
        self._loaded[version.number] = version

    def switch(self, number: int, canary: Canary | None = None) -> None:
        """Send new requests to a loaded version, but for those of a canary's users; those in flight stay
        where they are.
        """
        assert canary is None or canary.version in self._loaded, "a canary is loaded"
        self._current, self._canary = self._loaded[number].number, canary

    def remove(self, number: int) -> LoadedVersion:
        """Take a version that answers nobody out of reach of new requests."""
        assert number not in self.routed, "a version that answers is never removed"
        return self._loaded.pop(number)

    def clear(self) -> None:
        """Forget all versions: the engine that held them is gone."""
        self._loaded, self._current, self._canary = {}, None, None

    @contextmanager
    def hold(self, pinned: int | None = None, unit: str = "") -> Iterator[LoadedVersion]:
        """Route one request of a user, see unit_of: the version stays loaded until the block ends.

        Raises UnknownPolicyVersion, PolicyVersionUnavailable: the pinned version is not loaded.
        """
        version = self._routed_to(unit) if pinned is None else self._pinned(pinned)
        self._in_flight[version.number] = self._in_flight.get(version.number, 0) + 1
        try:
            yield version
        finally:
            self._in_flight[version.number] -= 1

    def _routed_to(self, unit: str) -> LoadedVersion:
        if self._canary is not None and self._canary.has(unit):
            return self._loaded[self._canary.version]
        return self.current

    def _pinned(self, number: int) -> LoadedVersion:
        if number in self._loaded:
            return self._loaded[number]
        available = ", ".join(map(str, self.loaded))
        if number > self._highest:
            raise UnknownPolicyVersion(f"there is no version {number}; available: {available}")
        raise PolicyVersionUnavailable(f"version {number} is not loaded; available: {available}")

    def in_flight(self, number: int) -> int:
        """Return how many requests a version still answers."""
        return self._in_flight.get(number, 0)

    async def drain(self, number: int, timeout_s: float) -> bool:
        """Wait until a version has no request in flight; say whether that came in time."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.in_flight(number):
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.01)
        return True
