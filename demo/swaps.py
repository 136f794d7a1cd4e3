"""How soon a published version answers: somebody asks again and again from its publication on.

Users come at random moments, so their first reply says more about them than about the swap.
"""

import asyncio
import time
from collections.abc import Callable

from demo.ledger import Ledger
from demo.speaker import Speaker
from thumbloop.client import GenerateOptions
from thumbloop.errors import ThumbloopError
from thumbloop.types import PolicyVersion, Strategy, VersionState

_POLL_S = 0.05
_GIVEN_UP = (VersionState.REJECTED, VersionState.ROLLED_BACK)
_SHORT = GenerateOptions(strategy=Strategy.NONE, max_tokens=2, is_excluded=True)


async def watch_swaps(
    speaker: Speaker, prompt: str, ledger: Ledger, newest: Callable[[], PolicyVersion]
) -> None:
    """Note when each version first answers, until cancelled. What is asked is never learned from."""
    while True:
        version = await asyncio.to_thread(newest)
        if version.version in ledger.first_answers or version.state in _GIVEN_UP:
            await asyncio.sleep(_POLL_S)
            continue
        try:
            reply = await speaker.generate(prompt, user_id="watcher", options=_SHORT)
        except ThumbloopError as error:
            ledger.fail(error)
            await asyncio.sleep(_POLL_S)
            continue
        ledger.evaluated.add(reply.response_id)
        ledger.first_answers.setdefault(reply.policy_version, time.time())
