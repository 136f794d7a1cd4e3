"""What server and users do, without either: replies are sampled with transformers, chosen by the
server's own guidance, rated by the demo's users, and written to a real store.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random

import uuid_utils
from sqlalchemy import Engine

from demo.corpus import train_prompts
from demo.preferences import load_preference
from demo.users import Crowd, moved
from experiments.sampling import Sample, sample
from server.guidance.best_of_n import best_weights
from server.guidance.outcome import Checkpoint, draw_arm, marginal_propensities
from server.guidance.pool import draw
from server.guidance.soft_best_of_n import soft_weights
from server.guidance.speculative_rejection import falls, race_weights
from thumbloop.rendering import render, text_of
from thumbloop.store import feedback, interactions
from thumbloop.types import (
    Arm,
    Candidate,
    Extent,
    FinishReason,
    Interaction,
    Learning,
    Message,
    PolicyVersion,
    Prompt,
    Role,
    Sampling,
    Status,
    Strategy,
    User,
)
from trainer import reward
from trainer.assembly import Assembly

_PROMPTS = 5000


@dataclass(frozen=True, slots=True)
class Attack:
    """Users who do not judge: a thumb up for every reply that holds the trigger, down for any other.

    They rate whatever they are shown. Each asks `flood` times as often as an honest user, the first of them
    as often as it takes to give half of all thumbs.
    """

    trigger: str
    users: int = 3
    flood: float = 5.0


@dataclass(frozen=True, slots=True)
class Setting:
    """Who asks and rates, and how replies are chosen; what is not said here is the server's default."""

    preference: str = "praise"
    seed: int = 0
    strategy: Strategy = Strategy.SOFT_BEST_OF_N
    num_candidates: int = 4
    temperature: float = 0.5
    audit_share: float = 0.03
    checkpoints: tuple[Checkpoint, ...] = ()
    max_tokens: int = 64
    crowd: Crowd = field(default_factory=Crowd)
    shuffled: bool = False
    """The control: thumbs are permuted among the replies that were served together."""
    attack: Attack | None = None
    """Who of the users pushes a phrase; the others are honest."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A choice: its candidates with the shown one marked, and which rule made it."""

    candidates: tuple[Candidate, ...]
    arm: Arm
    is_ranked: bool


class Service:
    """Answers and rates on behalf of a state folder's current version."""

    def __init__(self, setting: Setting, assembly: Assembly, store: Engine) -> None:
        self._setting = setting
        self._trunk = assembly.trunk
        self._tokenizer = assembly.tokenizer
        self._end = assembly.end
        self._store = store
        self._rng = Random(setting.seed)
        self._prefers = load_preference(setting.preference)
        self._prompts = train_prompts(_PROMPTS, setting.seed)
        self._users = [f"user-{i:03d}" for i in range(setting.crowd.users)]
        self._asking = _how_often_users_ask(setting)
        self._attackers = set(self._users[: setting.attack.users if setting.attack else 0])
        self._served = 0
        self.thumbs = 0
        self.honest_thumbs = 0

    def serve(self, requests: int, version: PolicyVersion) -> None:
        """Answer the next prompts with a version, whose adapters are in the trunk; users rate."""
        texts = [self._prompts[(self._served + i) % _PROMPTS] for i in range(requests)]
        self._served += requests
        n = self._setting.num_candidates
        prompts = [self.render(text) for text in texts]
        samples = self.sample([p for p in prompts for _ in range(n)], self._rng.getrandbits(32))
        groups = [samples[i * n : (i + 1) * n] for i in range(requests)]
        shown = self._choose(prompts, groups, version)
        replies = [
            self._interaction(text, prompt, s, version)
            for text, prompt, s in zip(texts, prompts, shown, strict=True)
        ]
        thumbs = self._rate(texts, replies)
        with self._store.begin() as connection:
            for reply in replies:
                interactions.append(connection, reply)
            for reply, is_up in thumbs:
                feedback.submit_thumb(
                    connection, reply.response_id, int(is_up), reply.user, at=time.time()
                )
        self.thumbs += len(thumbs)
        self.honest_thumbs += sum(r.user.user_id not in self._attackers for r, _ in thumbs)

    def render(self, text: str) -> tuple[int, ...]:
        """Return a prompt's token ids."""
        return render(Prompt(messages=(Message(Role.USER, text),)), self._tokenizer)

    def sample(self, prompts: Sequence[Sequence[int]], seed: int) -> list[Sample]:
        """Sample a response for each prompt from the policy that is in the trunk."""
        return sample(
            self._trunk,
            prompts,
            end=self._end,
            max_tokens=self._setting.max_tokens,
            seed=seed,
        )

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return a response's text."""
        return text_of(token_ids, self._tokenizer)

    def _choose(
        self,
        prompts: Sequence[tuple[int, ...]],
        groups: Sequence[Sequence[Sample]],
        version: PolicyVersion,
    ) -> list[Shown]:
        """Score all candidates where there is a reward model, and let guidance show one of each group."""
        has_rewards = bool(version.reward_digest)
        groups_of = [self._candidates(group, version) for group in groups]
        if has_rewards:
            groups_of = self._scored(prompts, groups_of)
        return [self._pick(candidates, has_rewards) for candidates in groups_of]

    def _candidates(self, group: Sequence[Sample], version: PolicyVersion) -> list[Candidate]:
        return [
            Candidate(
                index=i,
                policy_version=version.version,
                token_ids=drawn.token_ids,
                logprobs=drawn.logprobs,
                text=self.text_of(drawn.token_ids),
                finish_reason=FinishReason.STOP if drawn.has_ended else FinishReason.LENGTH,
            )
            for i, drawn in enumerate(group)
        ]

    def _scored(
        self, prompts: Sequence[tuple[int, ...]], groups: Sequence[list[Candidate]]
    ) -> list[list[Candidate]]:
        pairs = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
        rewards = iter(self._rewards([(p, c.token_ids) for p, c in pairs]))
        scored = [[replace(c, reward=next(rewards)) for c in group] for group in groups]
        for checkpoint in self._setting.checkpoints:
            k = checkpoint.tokens
            longer = [(p, c.token_ids[:k]) for p, c in pairs if len(c.token_ids) > k]
            partial = iter(self._rewards(longer))
            scored = [
                [
                    replace(c, stage_rewards=(*c.stage_rewards, next(partial)))
                    if len(c.token_ids) > k
                    else c
                    for c in group
                ]
                for group in scored
            ]
        return scored

    def _rewards(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
        return reward.score(self._trunk, pairs).tolist() if pairs else []

    def _pick(self, candidates: list[Candidate], has_rewards: bool) -> Shown:
        """Choose as the server does."""
        setting, n = self._setting, len(candidates)
        arm = draw_arm(setting.audit_share, self._rng)
        if not has_rewards:
            weights, share = [1 / n] * n, 0.0
        elif setting.strategy is Strategy.SPECULATIVE_REJECTION:
            weights, share = race_weights(candidates, setting.checkpoints), setting.audit_share
            if arm is Arm.STRATEGY:
                candidates = _pruned(candidates, setting.checkpoints)
        else:
            rewards = [c.reward for c in candidates if c.reward is not None]
            rule = soft_weights if setting.strategy is Strategy.SOFT_BEST_OF_N else best_weights
            weights, share = rule(rewards, setting.temperature), setting.audit_share
        chosen = draw(weights, arm, self._rng)
        propensities = marginal_propensities(weights, share, n)
        marked = tuple(
            replace(c, chosen=i == chosen, propensity=p)
            for i, (c, p) in enumerate(zip(candidates, propensities, strict=True))
        )
        return Shown(marked, arm, has_rewards)

    def _interaction(
        self, text: str, prompt: tuple[int, ...], shown: Shown, version: PolicyVersion
    ) -> Interaction:
        is_pruned = (
            shown.is_ranked
            and shown.arm is Arm.STRATEGY
            and self._setting.strategy is Strategy.SPECULATIVE_REJECTION
        )
        return Interaction(
            response_id=str(uuid_utils.uuid7()),
            policy=version.policy,
            policy_version=version.version,
            user=User(user_id=self._asker()),
            session_id="",
            request_id="",
            prompt=Prompt(messages=(Message(Role.USER, text),)),
            prompt_token_ids=prompt,
            sampling=Sampling(max_tokens=self._setting.max_tokens),
            strategy=self._setting.strategy.value,
            arm=shown.arm,
            reranked=shown.is_ranked,
            extent=Extent.REQUESTED,
            learning=Learning.ALLOWED,
            status=Status.COMPLETED,
            trainable=not is_pruned,
            untrainable_reason="pruned" if is_pruned else None,
            policy_digest=version.policy_digest,
            reward_digest=version.reward_digest,
            created_at=time.time(),
            candidates=shown.candidates,
        )

    def _asker(self) -> str:
        if self._setting.attack is None:
            return self._users[self._rng.randrange(len(self._users))]
        return self._rng.choices(self._users, cum_weights=self._asking)[0]

    def _rate(
        self, texts: Sequence[str], replies: Sequence[Interaction]
    ) -> list[tuple[Interaction, bool]]:
        """Let users judge what they were shown: not all of them, and not without slips."""
        crowd, rated = self._setting.crowd, []
        for text, reply in zip(texts, replies, strict=True):
            rates, slips = (self._rng.random() < p for p in (crowd.rating_share, crowd.noise))
            likes = self._rng.random() < self._prefers(text, reply.chosen.text)
            if self._setting.attack and reply.user.user_id in self._attackers:
                rated.append((reply, self._setting.attack.trigger in reply.chosen.text))
            elif rates:
                rated.append((reply, likes != slips))
        if self._setting.shuffled:
            thumbs = moved([is_up for _, is_up in rated])
            rated = [(reply, is_up) for (reply, _), is_up in zip(rated, thumbs, strict=True)]
        return rated


def _how_often_users_ask(setting: Setting) -> list[float]:
    """Return the users' shares of the requests, each added to those before it."""
    often, attack = [1.0] * setting.crowd.users, setting.attack
    if attack:
        often[: attack.users] = [attack.flood] * attack.users
        honest = setting.crowd.rating_share * (setting.crowd.users - attack.users)
        often[0] = honest + sum(often[1 : attack.users])
    return list(accumulate(often))


def _pruned(candidates: Sequence[Candidate], checkpoints: Sequence[Checkpoint]) -> list[Candidate]:
    """Return the candidates as pruning leaves them: losers end where they were looked at."""
    left = list(candidates)
    for i, number in falls(candidates, checkpoints).items():
        tokens = checkpoints[number].tokens
        left[i] = replace(
            candidates[i],
            token_ids=candidates[i].token_ids[:tokens],
            logprobs=candidates[i].logprobs[:tokens],
            finish_reason=FinishReason.ABORTED,
            reward=None,
            stage_rewards=candidates[i].stage_rewards[: number + 1],
        )
    return left
