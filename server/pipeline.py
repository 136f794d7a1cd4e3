"""prompt -> candidates -> rewards -> choice -> log: the page to read first."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from random import Random

import uuid_utils

from server.calibration import Calibration
from server.engine import Engine
from server.guidance import Choice, Guidance, Outcome
from server.rollout import Load, RolloutWorker, derive_seed
from server.routes import LoadedVersion, Routes
from server.scoring import Mixture
from thumbloop.errors import InvalidRequest
from thumbloop.rendering import VerdictTokens, render
from thumbloop.types import (
    DEFAULT_POLICY,
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
    learning: Learning = Learning.ALLOWED
    policy_version: int | None = None


class Pipeline:
    """Answers requests. `log` returns once the row is durable."""

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
        on_fallback: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._engine = engine
        self._scorer = scorer
        self._verdict = verdict
        self._routes = routes
        self._log = log
        self._calibration = calibration
        self._scoring_timeout_s = scoring_timeout_s
        self._on_fallback = on_fallback
        self._load = Load()

    async def respond(self, request: Request) -> Interaction:
        """Answer from the routed version with the candidate that guidance chose.

        Raises InvalidRequest, UnknownPolicyVersion, PolicyVersionUnavailable, EngineUnavailable,
        StoreUnavailable.
        """
        prompt = self._render(request)
        with self._routes.hold(request.policy_version) as version:
            outcome = await self._guide(request, prompt, version)
        interaction = _interaction(request, prompt, version, outcome)
        await self._log(interaction)
        return interaction

    async def _guide(
        self, request: Request, prompt: tuple[int, ...], version: LoadedVersion
    ) -> Outcome:
        """Let the request's strategy sample, score and choose, within what can be afforded now."""
        worker = RolloutWorker(
            self._engine,
            self._scorer,
            version,
            request.prompt,
            prompt,
            request.sampling,
            scoring_timeout_s=self._scoring_timeout_s,
            load=self._load,
        )
        choice, extent = self._calibration.plan(
            version.number, request.choice, request.sampling.max_tokens, self._load.candidates
        )
        started = time.perf_counter()
        outcome = await request.guidance.run(worker, choice, _rng(request.sampling.seed))
        self._calibration.observe(version.number, choice, outcome, time.perf_counter() - started)
        if outcome.fallback:
            self._on_fallback(outcome.fallback)
        is_as_planned = outcome.extent is Extent.REQUESTED
        return replace(outcome, extent=extent) if is_as_planned else outcome

    def _render(self, request: Request) -> tuple[int, ...]:
        """Return the prompt's token ids, with room left for the reply and the verdict."""
        prompt = render(request.prompt, self._engine.tokenizer)
        room = self._engine.max_model_len - len(self._verdict.prompt) - 1
        if len(prompt) + request.sampling.max_tokens > room:
            raise InvalidRequest.of(
                "prompt",
                f"has {len(prompt)} tokens; with max_tokens={request.sampling.max_tokens} it may"
                f" have {max(room - request.sampling.max_tokens, 0)} in this model's context",
            )
        return prompt


def _rng(seed: int | None) -> Random:
    """Return the source of guidance's own draws: reproducible where the request has a seed."""
    return Random() if seed is None else Random(derive_seed(seed, _CHOICE_SEED))


def _interaction(
    request: Request, prompt: tuple[int, ...], version: LoadedVersion, outcome: Outcome
) -> Interaction:
    untrainable = request.sampling.untrainable_reason or outcome.selected or None
    if request.learning is Learning.EXCLUDED:
        untrainable = "learning_excluded"
    return Interaction(
        response_id=str(uuid_utils.uuid7()),
        policy=DEFAULT_POLICY,
        policy_version=version.number,
        user=request.user,
        session_id=request.session_id,
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=prompt,
        sampling=request.sampling,
        strategy=request.guidance.name,
        arm=outcome.arm,
        reranked=outcome.reranked,
        extent=outcome.extent,
        learning=request.learning,
        status=Status.COMPLETED,
        trainable=untrainable is None,
        untrainable_reason=untrainable,
        policy_digest=version.facts.policy_digest,
        reward_digest=version.facts.reward_digest,
        created_at=time.time(),
        candidates=outcome.candidates,
    )
