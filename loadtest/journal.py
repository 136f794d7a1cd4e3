"""What people ask and say, written down call by call: what was sent, when, and what came back."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from thumbloop.client import AsyncClient, GenerateOptions
from thumbloop.errors import ThumbloopError

OK = "OK"
_AFTER_A_FAILURE_S = 0.1


@dataclass(frozen=True, slots=True)
class Entry:
    """One call, or something that happened beside them (`kind`). Times are unix seconds.

    `prompt` is the number of what was asked, None where the reply was not greedy; `what` says the rest:
    of a reply its version and text, of a thumb its value and what it was for.
    """

    kind: str
    began: float
    ended: float
    status: str
    prompt: int | None
    what: dict[str, Any]


class Journal:
    """Entries in the order in which they ended, in memory and in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.entries: list[Entry] = []
        self._file = path.open("w")

    def note(self, entry: Entry) -> None:
        """Write down what has ended."""
        self.entries.append(entry)
        self._file.write(json.dumps(asdict(entry)) + "\n")

    def happened(self, kind: str, **what: Any) -> None:
        """Write down what happened just now, beside the calls."""
        now = time.time()
        self.note(Entry(kind, now, now, OK, None, what))

    def of(self, kind: str) -> list[Entry]:
        """Return the entries of one kind."""
        return [entry for entry in self.entries if entry.kind == kind]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class People:
    """Users who ask and rate one after another, some greedily; a failed call is noted, and they go on."""

    def __init__(
        self,
        client: AsyncClient,
        journal: Journal,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        greedy_share: float,
        rates: bool,
        seed: int,
    ) -> None:
        self._client = client
        self._journal = journal
        self._prompts = prompts
        self._greedy = GenerateOptions(num_candidates=1, temperature=0.0, max_tokens=max_tokens)
        self._guided = GenerateOptions(max_tokens=max_tokens)
        self._greedy_share = greedy_share
        self._rates = rates
        self._seed = seed

    async def use(self, number: int, until: asyncio.Event, pause_s: float = 0.0) -> None:
        """Be one of them until told to leave; `pause_s` is the mean of what they think between."""
        rng, user = Random(f"{self._seed}:{number}"), f"user-{number}"
        while not until.is_set():
            is_greedy = rng.random() < self._greedy_share
            entry = await self.ask(rng.randrange(len(self._prompts)), user, is_greedy=is_greedy)
            if entry.status == OK and self._rates:
                await self._rate(entry, user, up=rng.random() < 0.5)
            thinking_s = rng.expovariate(1 / pause_s) if pause_s else 0.0
            await asyncio.sleep(thinking_s if entry.status == OK else _AFTER_A_FAILURE_S)

    @asynccontextmanager
    async def present(self, users: int, pause_s: float = 0.0) -> AsyncIterator[None]:
        """Let so many of them be there for as long as the block lasts."""
        leaving = asyncio.Event()
        tasks = [asyncio.create_task(self.use(n, leaving, pause_s)) for n in range(users)]
        try:
            yield
        finally:
            leaving.set()
            await asyncio.gather(*tasks)

    async def ask(
        self, prompt: int, user: str, *, is_greedy: bool, pin: int | None = None
    ) -> Entry:
        """Ask once, of a version where one is pinned; the entry is in the journal, too."""
        options, status = self._greedy if is_greedy else self._guided, OK
        what: dict[str, Any] = {}
        if pin is not None:
            options = replace(options, policy_version=pin)
        began = time.time()
        try:
            reply = await self._client.generate(
                self._prompts[prompt], is_text=True, user_id=user, options=options
            )
        except ThumbloopError as error:
            status, what = error.code.name, {"words": str(error)}
        else:
            what = {
                "response_id": reply.response_id,
                "version": reply.policy_version,
                "text": reply.text,
                "prompt_tokens": reply.usage.prompt_tokens,
            }
        kind = "generate" if pin is None else "solo"
        entry = Entry(kind, began, time.time(), status, prompt if is_greedy else None, what)
        self._journal.note(entry)
        return entry

    async def _rate(self, reply: Entry, user: str, *, up: bool) -> None:
        what: dict[str, Any] = {"response_id": reply.what["response_id"], "up": up}
        began, status = time.time(), OK
        try:
            stored = await self._client.rate(what["response_id"], up=up, user_id=user)
        except ThumbloopError as error:
            status = error.code.name
        else:
            what["feedback_id"] = stored.feedback_id
        self._journal.note(Entry("rate", began, time.time(), status, None, what))
