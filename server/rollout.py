"""One request's hands on the engine: sample and score candidates of one version, all on one prompt."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from server.engine import Engine
from server.routes import LoadedVersion
from server.scoring import Scorer
from thumbloop.rendering import text_of
from thumbloop.types import Candidate, Sampling


class RolloutWorker:
    """Samples and scores candidates of one prompt under one version, whatever is current since."""

    def __init__(
        self,
        engine: Engine,
        scorer: Scorer,
        version: LoadedVersion,
        prompt: Sequence[int],
        sampling: Sampling,
    ) -> None:
        self._engine = engine
        self._scorer = scorer
        self._version = version
        self._prompt = prompt
        self._sampling = sampling

    @property
    def can_score(self) -> bool:
        """Say whether the version has a reward model; the base model has none."""
        return self._version.reward is not None

    async def sample(self, index: int) -> Candidate:
        """Sample candidate `index`, with a seed of its own where the request has one."""
        seed = None if self._sampling.seed is None else derive_seed(self._sampling.seed, index)
        sampled = await self._engine.sample(
            self._prompt, replace(self._sampling, seed=seed), self._version.policy
        )
        return Candidate(
            index=index,
            policy_version=self._version.number,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            text=_before(self._sampling.stop, text_of(sampled.token_ids, self._engine.tokenizer)),
            finish_reason=sampled.finish_reason,
        )

    async def score(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its reward."""
        assert self._version.reward is not None, "ask can_score first"
        reward = await self._scorer.score(self._prompt, candidate.token_ids, self._version.reward)
        return replace(candidate, reward=reward)


def _before(stops: Sequence[str], text: str) -> str:
    """Return the text up to the first stop: stops end a reply, they are no part of it."""
    found = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of candidate `index`: equal for equal arguments on every machine."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
