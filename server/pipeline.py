"""prompt -> candidates -> rewards -> choice -> log: the page to read first."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

import uuid_utils

from server.calibration import Calibration
from server.canary import unit_of
from server.engine import BACKGROUND_PRIORITY, REPLY_PRIORITY, Engine
from server.guidance import Choice, Guidance, Outcome
from server.rollout import Load, RolloutWorker, derive_seed
from server.routes import LoadedVersion, Routes
from server.scoring import Mixture
from server.speech import Speech
from thumbloop.errors import CorruptedReply, InvalidRequest, Overloaded, StoreUnavailable
from thumbloop.rendering import VerdictTokens, encode_reply, render
from thumbloop.store.trials import CORRUPTED
from thumbloop.types import (
    DEFAULT_POLICY,
    Arm,
    Extent,
    Interaction,
    Learning,
    Prompt,
    Sampling,
    Status,
    User,
)

_CHOICE_SEED = -1  # the index of the guidance's own draw, beside the candidates' 0, 1, 2, ...


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asked for, complete and valid."""

    prompt: Prompt
    sampling: Sampling
    guidance: Guidance
    choice: Choice
    user: User
    session_id: str = ""
    request_id: str = ""
    request_digest: str = ""
    learning: Learning = Learning.ALLOWED
    is_background: bool = False
    policy_version: int | None = None
    shows_candidates: bool = False
    came: float = field(default_factory=time.perf_counter)

    def after_its_wait(self) -> "Request":
        """Return the request with what is left, now that it has its turn, of the time it came with."""
        limit_s = self.choice.time_limit_s
        if limit_s is None:
            return self
        left_s = max(limit_s - (time.perf_counter() - self.came), 0.0)
        return replace(self, choice=replace(self.choice, time_limit_s=left_s))


class Pipeline:
    """Answers requests. `log` takes a row, and what it returns is awaited for it to be durable."""

    def __init__(
        self,
        engine: Engine,
        scorer: Mixture,
        verdict: VerdictTokens,
        routes: Routes,
        log: Callable[[Interaction], Awaitable[None]],
        calibration: Calibration,
        *,
        scoring_timeout_s: float,
        max_prompt_tokens: int | None = None,
        on_fallback: Callable[[str], None] = lambda _reason: None,
        on_rerank: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._max_prompt_tokens = max_prompt_tokens
        self._engine = engine
        self._scorer = scorer
        self._verdict = verdict
        self._routes = routes
        self._log = log
        self._calibration = calibration
        self._scoring_timeout_s = scoring_timeout_s
        self._on_fallback = on_fallback
        self._on_rerank = on_rerank
        self._load = Load()

    async def respond(
        self, request: Request, prompt: tuple[int, ...], speech: Speech | None = None
    ) -> Interaction:
        """Answer from the routed version with the candidate that guidance chose.

        `prompt` is what `render` returned; `speech` hears the reply as it grows. Cancelling aborts
        all the engine does for it, and leaves a row that says so.
        Raises UnknownPolicyVersion, PolicyVersionUnavailable, EngineUnavailable, CorruptedReply,
        StoreUnavailable.
        """
        response_id = str(uuid_utils.uuid7())
        if speech is not None:
            speech.begin(response_id)
        unit = unit_of(request.user, request.session_id) or response_id
        with self._routes.hold(request.policy_version, unit) as version:
            row = _Row(response_id, request, prompt, version, time.perf_counter())
            try:
                outcome = await self._guide(request, prompt, version, speech)
            except asyncio.CancelledError:
                self._note(row.given_up(Status.CANCELLED, "cancelled"))
                raise
            except (InvalidRequest, Overloaded):
                raise  # it was not the version's fault
            except Exception as error:
                reason = CORRUPTED if isinstance(error, CorruptedReply) else "failed"
                self._note(row.given_up(Status.FAILED, reason))
                raise
        if speech is not None:
            speech.say(outcome.chosen.text)
        interaction = row.completed(outcome)
        await self._write(interaction)
        return interaction

    def _note(self, interaction: Interaction) -> None:
        """Log what came to nothing, if it can be: nobody waits for it."""
        with suppress(StoreUnavailable):
            writing = asyncio.ensure_future(self._log(interaction))
            writing.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _write(self, interaction: Interaction) -> None:
        """Log a reply. A caller that gives up meanwhile has ended only when it is known what became of it:
        a retry looks for the row."""
        writing = asyncio.ensure_future(self._log(interaction))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.gather(writing, return_exceptions=True)
            raise

    async def _guide(
        self,
        request: Request,
        prompt: tuple[int, ...],
        version: LoadedVersion,
        speech: Speech | None,
    ) -> Outcome:
        """Let the request's strategy sample, score and choose, within what can be afforded now."""
        choice, extent = self._calibration.plan(
            version.number,
            request.choice,
            request.sampling.max_tokens,
            self._load.candidates,
            self._routes.routed.compared,
        )
        started = time.perf_counter()
        with self._load.share(choice.num_candidates) as share:
            worker = RolloutWorker(
                self._engine,
                self._scorer,
                version,
                request.prompt,
                prompt,
                request.sampling,
                scoring_timeout_s=self._scoring_timeout_s,
                share=share,
                priority=BACKGROUND_PRIORITY if request.is_background else REPLY_PRIORITY,
                listener=None if speech is None else speech.say,
            )
            outcome = await request.guidance.run(worker, choice, _rng(request.sampling.seed))
        self._calibration.observe(version.number, choice, outcome, time.perf_counter() - started)
        if outcome.fallback:
            self._on_fallback(outcome.fallback)
        if outcome.reranked:
            self._on_rerank(time.perf_counter() - worker.sampled_at)
        is_as_planned = outcome.extent is Extent.REQUESTED
        return replace(outcome, extent=extent) if is_as_planned else outcome

    def render(self, request: Request) -> tuple[int, ...]:
        """Return the prompt's token ids, with room left for the reply and the verdict.

        Raises InvalidRequest.
        """
        prompt = render(request.prompt, self._engine.tokenizer)
        if self._max_prompt_tokens is not None and len(prompt) > self._max_prompt_tokens:
            raise InvalidRequest.of(
                "prompt", f"has {len(prompt)} tokens, at most {self._max_prompt_tokens} allowed"
            )
        room = self._engine.max_model_len - len(self._verdict.prompt) - 1
        if len(prompt) + request.sampling.max_tokens > room:
            raise InvalidRequest.of(
                "prompt",
                f"has {len(prompt)} tokens; with max_tokens={request.sampling.max_tokens} it may"
                f" have {max(room - request.sampling.max_tokens, 0)} in this model's context",
            )
        return prompt

    def read(
        self, prompt: Prompt, reply: str, field: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids of a prompt and of a reply that was not sampled here, in `field` of a request.

        Raises InvalidRequest: the context has no room for both and the verdict.
        """
        tokenizer = self._engine.tokenizer
        prompt_ids, reply_ids = render(prompt, tokenizer), encode_reply(reply, tokenizer)
        room = self._engine.max_model_len - len(self._verdict.prompt) - 1
        if len(prompt_ids) + len(reply_ids) > room:
            raise InvalidRequest.of(
                field,
                f"has {len(reply_ids)} tokens and its prompt {len(prompt_ids)};"
                f" this model's context has room for {room}",
            )
        return prompt_ids, reply_ids


def _rng(seed: int | None) -> Random:
    """Return the source of guidance's own draws: reproducible where the request has a seed."""
    return Random() if seed is None else Random(derive_seed(seed, _CHOICE_SEED))


class _Row(NamedTuple):
    """What is known of an interaction before its outcome."""

    response_id: str
    request: Request
    prompt: tuple[int, ...]
    version: LoadedVersion
    began: float

    def completed(self, outcome: Outcome) -> Interaction:
        """Return the row of a request that was answered."""
        request = self.request
        untrainable = request.sampling.untrainable_reason or outcome.selected or None
        if request.learning is Learning.EXCLUDED:
            untrainable = "learning_excluded"
        return self._row(
            Status.COMPLETED,
            untrainable,
            arm=outcome.arm,
            reranked=outcome.reranked,
            extent=outcome.extent,
            request_digest=request.request_digest,
            candidates=outcome.candidates,
        )

    def given_up(self, status: Status, reason: str) -> Interaction:
        """Return the row of a request that came to nothing; a retry of it will be another request."""
        return self._row(
            status,
            reason,
            arm=Arm.STRATEGY,
            reranked=False,
            extent=Extent.REQUESTED,
            request_digest="",
            candidates=(),
        )

    def _row(self, status: Status, untrainable: str | None, **outcome: Any) -> Interaction:
        request, version = self.request, self.version
        return Interaction(
            response_id=self.response_id,
            policy=DEFAULT_POLICY,
            policy_version=version.number,
            user=request.user,
            session_id=request.session_id,
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=self.prompt,
            sampling=request.sampling,
            strategy=request.guidance.name,
            learning=request.learning,
            status=status,
            trainable=untrainable is None,
            untrainable_reason=untrainable,
            policy_digest=version.facts.policy_digest,
            reward_digest=version.facts.reward_digest,
            created_at=time.time(),
            duration_s=time.perf_counter() - self.began,
            pinned=request.policy_version is not None,
            shows_candidates=request.shows_candidates,
            **outcome,
        )
