"""What answers requests, as it is."""

from collections.abc import Awaitable, Callable, Mapping

from server.guidance import Guidance
from server.ratings import Listener
from server.reception import Answering
from thumbloop.types import Interaction

Log = Callable[[Interaction], Awaitable[None]]


class Unwatched:
    """Leaves all as it is."""

    listener: Listener | None = None
    """Hears of feedback."""

    def reception(self, reception: Answering) -> Answering:
        """Return what answers calls."""
        return reception

    def strategies(self, strategies: Mapping[str, Guidance]) -> Mapping[str, Guidance]:
        """Return what guides them."""
        return strategies

    def log(self, log: Log) -> Log:
        """Return what stores replies."""
        return log

    async def stop(self) -> None:
        """Let go."""
