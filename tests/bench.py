"""A trainer on a tiny model, its store, and what users and the server do to it."""

import dataclasses
import random

import torch
from rich.console import Console

from tests.rows import candidate, interaction
from tests.stores import empty_state
from thumbloop.base_model import claim_base, identify
from thumbloop.config import Model, TrainerConfig
from thumbloop.config.trainer import Gate, Lora, Ppo, Resources, RewardFit, Round
from thumbloop.rendering import VerdictTokens
from thumbloop.store import (
    deployments,
    erasure,
    feedback,
    interactions,
    open_store,
    preferences,
    reading,
    versions,
)
from thumbloop.store.erasure import Erasure
from thumbloop.types import FinishReason, User, VersionState
from trainer.assembly import new_learner
from trainer.batches import collate
from trainer.loop import Loop
from trainer.metrics import TrainerMetrics
from trainer.models import Trunk

LIKED = 20
VERDICT = VerdictTokens(prompt=(5,), up=6, down=7, is_special=True)
ONE_ROUND = TrainerConfig(round=Round(max_rounds=1, poll_interval_s=0.01))


class Bench:
    """A trainer on a tiny model, with a store that can be filled and a server that can adopt."""

    def __init__(self, folder, model, **settings):
        self.config = TrainerConfig(
            state=settings.pop("state", None) or empty_state(folder / "state"),
            model=Model(path=str(model)),
            round=Round(
                first_feedback=32,
                min_feedback=32,
                min_rollouts=16,
                max_rollouts=64,
                poll_interval_s=0.01,
                retry_interval_s=0.01,
                max_user_factor=1e9,  # users are drawn: some rate more than twice as often
            ),
            lora=Lora(rank=4, alpha=8),
            **{
                "ppo": Ppo(minibatch_size=16, epochs=2),
                "gate": Gate(error_rate=0.2),
                "reward": RewardFit(learning_rate=1e-2, batch_size=8, epochs=3),
                **settings,
            },
        )
        self.engine = open_store(self.config.state)
        self.base = identify(model)
        claim_base(self.config.state.versions, "default", self.base, 0.0)
        self.trunk = Trunk.open(model, self.config.lora, VERDICT, Resources(device="cpu"))
        self.metrics = TrainerMetrics(folder / "tensorboard", Console(quiet=True))
        self.lines: list[str] = []
        self.metrics.say = self.lines.append
        self.loop = self.new_loop()
        self.random = random.Random(0)

    def new_loop(self) -> Loop:
        learner = new_learner(self.config, self.trunk, self.base, self.metrics, str)
        return Loop(
            self.config,
            self.engine,
            self.trunk,
            learner,
            self.base,
            self.metrics,
            vocabulary=range(8, 60),
            end=(1,),
        )

    def rate(
        self, n: int, version: int = 0, *, shuffled: bool = False, user: str | None = None
    ) -> None:
        """Store n rated replies of two candidates; thumbs go up for the liked token, or at random.

        They are one user's, or those of twenty.
        """
        prompts = [self._prompt() for _ in range(n)]
        pairs = [(prompt, self._response()) for prompt in prompts for _ in (0, 1)]
        with torch.no_grad():
            batch = collate(pairs)
            logprobs = self.trunk.respond(batch, torch.ones(2 * n, 1), "policy").logprobs.tolist()
        for i in range(n):
            two = tuple(
                candidate(
                    k,
                    policy_version=version,
                    token_ids=pairs[2 * i + k][1],
                    logprobs=tuple(logprobs[2 * i + k][: len(pairs[2 * i + k][1])]),
                    finish_reason=FinishReason.STOP,
                )
                for k in (0, 1)
            )
            liked = self.random.random() < 0.5 if shuffled else LIKED in two[0].token_ids
            with self.engine.begin() as connection:
                reply = interaction(
                    policy_version=version,
                    prompt_token_ids=pairs[2 * i][0],
                    candidates=two,
                    user=User(user_id=user or f"user {self.random.randrange(20)}"),
                )
                reply = dataclasses.replace(
                    reply, sampling=dataclasses.replace(reply.sampling, seed=None)
                )
                interactions.append(connection, reply)
                feedback.submit_thumb(connection, reply.response_id, int(liked), reply.user, at=1.0)

    def prefer(self, n: int) -> None:
        """Store preferences for the liked token among the candidates of the n latest replies."""
        with self.engine.begin() as connection:
            for reply in interactions.list_since(connection, "default", 0)[-n:]:
                liked = [LIKED in c.token_ids for c in reply.candidates]
                better = int(liked[1] and not liked[0])
                preferences.submit_preference(
                    connection, reply.response_id, better, 1 - better, reply.user, at=1.0
                )

    def adopt(self, version: int, state: VersionState = VersionState.CURRENT) -> None:
        with self.engine.begin() as connection:
            deployments.set_state(connection, "default", version, state, at=1.0)

    def forget(self, user: str) -> Erasure:
        with self.engine.begin() as connection:
            return erasure.erase(
                connection, "default", User(user_id=user), at=2.0, actor="operator"
            )

    def versions(self) -> list[int]:
        with reading(self.engine) as connection:
            return [v.version for v in versions.list_versions(connection, "default")]

    def get(self, version: int):
        with reading(self.engine) as connection:
            return versions.get(connection, "default", version)

    def rounds(self):
        with reading(self.engine) as connection:
            return versions.list_rounds(connection, "default")

    def new_feedback(self, version: int) -> int:
        with reading(self.engine) as connection:
            learned_by = versions.learned_by(connection, "default", version)
            return feedback.count_new(connection, "default", learned_by).usable

    def _prompt(self) -> tuple[int, ...]:
        return tuple(self.random.randrange(21, 40) for _ in range(3))

    def _response(self) -> tuple[int, ...]:
        tokens = [self.random.randrange(8, 19) for _ in range(self.random.randint(3, 5))]
        if self.random.random() < 0.5:
            tokens[self.random.randrange(len(tokens))] = LIKED
        return (*tokens, 1)
