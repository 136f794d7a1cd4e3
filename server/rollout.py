"""One request's hands on the engine: sample and score candidates of one version, all on one prompt."""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial

from server.engine import REPLY_PRIORITY, SECOND_WAVE_PRIORITY, Engine, Sampled
from server.guidance import NotScored
from server.reading import Reading
from server.routes import LoadedVersion
from server.scoring import Mixture
from thumbloop.errors import CorruptedReply, EngineUnavailable, Overloaded, ScorerUnavailable
from thumbloop.rendering import TextStream, text_of
from thumbloop.types import Candidate, FinishReason, Prompt, Sampling

log = logging.getLogger(__name__)

_LESS_URGENT = SECOND_WAVE_PRIORITY - REPLY_PRIORITY

Listener = Callable[[str], None]
"""Takes a reply's text so far, as often as it grows; what it raises ends the sampling."""


class Load:
    """How many candidates are being sampled or about to be, of all requests together."""

    def __init__(self) -> None:
        self.candidates = 0

    @contextmanager
    def share(self, count: int) -> "Iterator[Share]":
        """Count a request's candidates from when they are planned: others plan before they begin."""
        share = Share(self, count)
        self.candidates += count
        try:
            yield share
        finally:
            self.candidates -= share.planned


class Share:
    """One request's part of the load."""

    def __init__(self, load: Load, planned: int) -> None:
        self._load = load
        self.planned = planned  # and not begun

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count one planned candidate while it is being sampled, and no longer."""
        self.planned -= 1
        try:
            yield
        finally:
            self._load.candidates -= 1


class RolloutWorker:
    """Samples and scores candidates of one prompt under one version, whatever is current since."""

    def __init__(
        self,
        engine: Engine,
        scorer: Mixture,
        version: LoadedVersion,
        prompt: Prompt,
        prompt_token_ids: tuple[int, ...],
        sampling: Sampling,
        *,
        scoring_timeout_s: float,
        share: Share,
        priority: int = REPLY_PRIORITY,
        listener: Listener | None = None,
    ) -> None:
        self._engine = engine
        self._scorer = scorer
        self._version = version
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._sampling = sampling
        self._scoring_timeout_s = scoring_timeout_s
        self._share = share
        self._priority = priority
        self._listener = listener
        self._shown: int | None = None
        self._decodings: dict[int, StreamedDecoding] = {}
        self.sampled_at = time.perf_counter()
        """When the engine last gave a candidate, or a part of one, on the clock of performance."""

    @property
    def can_score(self) -> bool:
        """Say whether there is an opinion on the version's replies; there may be none on the base's."""
        return self._scorer.can_score(self._version.reward)

    async def sample(self, index: int, *, is_urgent: bool = True) -> Candidate:
        """Sample candidate `index`, with a seed of its own where the request has one."""
        if index == self._shown and self._listener is not None:
            return await self._sample_aloud(index)
        with self._share.one():
            sampled = await self._engine.sample(
                self._prompt_token_ids,
                self._sampling_of(index),
                self._version.policy,
                priority=self._priority_of(is_urgent),
            )
        return self._candidate(index, sampled)

    def _priority_of(self, is_urgent: bool) -> int:
        return self._priority if is_urgent else self._priority + _LESS_URGENT

    async def _sample_aloud(self, index: int) -> Candidate:
        decoding = self.begin(index)
        try:
            return await decoding.finish()
        finally:
            await decoding.abort()

    def begin(self, index: int) -> "StreamedDecoding":
        """Begin to sample candidate `index`, to be looked at on the way."""
        stream = self._engine.stream(
            self._prompt_token_ids,
            self._sampling_of(index),
            self._version.policy,
            priority=self._priority,
        )
        decoding = StreamedDecoding(stream, partial(self._candidate, index), self._share)
        self._decodings[index] = decoding
        if index == self._shown:
            self.show(index)
        return decoding

    def show(self, index: int) -> None:
        """Let the caller, where it listens, hear candidate `index` as it grows."""
        self._shown = index
        if self._listener is not None and index in self._decodings:
            text = TextStream(self._engine.tokenizer)
            self._decodings[index].tell(partial(self._say, text, self._listener))

    def _say(self, text: TextStream, listener: Listener, sampled: Sampled) -> None:
        listener(_certain(self._sampling.stop, text.read(sampled.token_ids)))

    def _sampling_of(self, index: int) -> Sampling:
        if self._sampling.seed is None:
            return self._sampling
        return replace(self._sampling, seed=derive_seed(self._sampling.seed, index))

    def _candidate(self, index: int, sampled: Sampled) -> Candidate:
        if not all(map(math.isfinite, sampled.logprobs)):
            number = self._version.number
            raise CorruptedReply(f"version {number} gave log-probabilities that are no numbers")
        self.sampled_at = time.perf_counter()
        return Candidate(
            index=index,
            policy_version=self._version.number,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            text=_before(self._sampling.stop, text_of(sampled.token_ids, self._engine.tokenizer)),
            finish_reason=sampled.finish_reason,
        )

    async def score(self, candidate: Candidate, *, is_urgent: bool = True) -> Candidate:
        """Return the candidate with its reward. Raises NotScored: the reply has to do without."""
        reading = Reading(self._prompt, self._prompt_token_ids, candidate.token_ids, candidate.text)
        try:
            async with asyncio.timeout(self._scoring_timeout_s):
                reward, components = await self._scorer.score(
                    reading, self._version.reward, self._priority_of(is_urgent)
                )
        except TimeoutError:
            raise NotScored("late") from None
        except Overloaded:
            raise NotScored("full") from None
        except (EngineUnavailable, ScorerUnavailable) as error:
            log.warning("scoring failed: %s", error)
            raise NotScored("down") from None
        if not math.isfinite(reward):
            raise NotScored("wrong")
        return replace(candidate, reward=reward, reward_components=components)


class StreamedDecoding:
    """One candidate on its way; see guidance's Decoding."""

    def __init__(
        self,
        stream: AsyncGenerator[Sampled, None],
        candidate_of: Callable[[Sampled], Candidate],
        share: Share,
    ) -> None:
        self._share = share
        self._candidate_of = candidate_of
        self._latest = Sampled((), (), FinishReason.ABORTED)
        self._has_ended = False
        self._hear: Callable[[Sampled], None] | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.ensure_future(self._follow(stream))

    async def _follow(self, stream: AsyncGenerator[Sampled, None]) -> None:
        try:
            async with aclosing(stream):  # also where whoever hears it has had enough
                with self._share.one():
                    async for sampled in stream:
                        self._latest = sampled
                        self._changed.set()
                        if self._hear is not None:
                            self._hear(sampled)
        finally:
            self._has_ended = True
            self._changed.set()

    def tell(self, hear: Callable[[Sampled], None]) -> None:
        """Let somebody hear what there is of it, now and whenever it grows; an error of theirs ends it."""
        self._hear = hear
        if self._latest.token_ids:
            hear(self._latest)

    async def until(self, tokens: int) -> Candidate:
        """Wait for that many tokens, or the end."""
        await self._until(tokens)
        latest = self._latest
        has_more = len(latest.token_ids) > tokens  # by count: it must not matter how late we look
        if has_more or latest.finish_reason is FinishReason.ABORTED:
            part = Sampled(
                latest.token_ids[:tokens], latest.logprobs[:tokens], FinishReason.ABORTED
            )
            return self._candidate_of(part)
        return self._candidate_of(latest)

    async def finish(self) -> Candidate:
        """Wait for the end."""
        await self._until(math.inf)
        return self._candidate_of(self._latest)

    async def abort(self) -> Candidate:
        """Stop it; return what there is."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        if not self._task.cancelled():
            self._task.exception()  # it is stopped; what else it had to say is of no use
        return self._candidate_of(self._latest)

    async def _until(self, tokens: float) -> None:
        while not self._has_ended and len(self._latest.token_ids) < tokens:
            self._changed.clear()
            await self._changed.wait()
        if self._has_ended:
            await self._task  # raises what ended it


def _before(stops: Sequence[str], text: str) -> str:
    """Return the text up to the first stop: stops end a reply, they are no part of it."""
    found = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


def _certain(stops: Sequence[str], text: str) -> str:
    """Return the text up to the first stop, or up to what may become one."""
    whole = _before(stops, text)
    if len(whole) < len(text):
        return whole
    begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(begun, default=0)]


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of candidate `index`: equal for equal arguments on every machine."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
