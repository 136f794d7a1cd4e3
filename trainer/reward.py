"""Fitting the reward model to thumbs and comparisons: cross-entropy on the verdict logit.

`sigmoid(reward)` is the probability of a thumb up; of two replies the better one's reward is to be the
higher.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from thumbloop.config.trainer import RewardFit
from trainer.batches import Pair
from trainer.calibration import Claims, log_odds
from trainer.evidence import Evidence, held_out_auroc, ordered_right, pool
from trainer.measure import batches_of
from trainer.models import Trunk
from trainer.ppo import NotFinite
from trainer.rollouts import Comparison, Judgement, Thumb, unrated
from trainer.weights import weigh

FOLDS = 4


class Fit(NamedTuple):
    """How a fit went: the last pass's mean loss, and the offset under which it was made, logits."""

    loss: float
    offset: float


class Trial(NamedTuple):
    """What a reward model says of feedback that it was not fitted on."""

    thumbs: tuple[Thumb, ...]
    rewards: tuple[float, ...]  # one for each thumb
    comparisons: tuple[Comparison, ...] = ()
    margins: tuple[float, ...] = ()  # one for each comparison: better minus worse
    offset: float = 0.0  # the model's, see Fit

    @property
    def evidence(self) -> Evidence:
        """Return how well it ranks; of a reply with a thumb no comparison counts beside it."""
        thumbs = held_out_auroc(self.rewards, [t.is_up for t in self.thumbs])
        alone = {c.preference_id for c in unrated([*self.thumbs, *self.comparisons])}
        counted = [
            (margin, c.response_id)
            for margin, c in zip(self.margins, self.comparisons, strict=True)
            if c.preference_id in alone
        ]
        margins, replies = zip(*counted, strict=True) if counted else ((), ())
        return pool([thumbs, ordered_right(margins, replies)])

    @property
    def claims(self) -> Claims:
        """Return what it says as probabilities."""
        return Claims(self.rewards, [t.is_up for t in self.thumbs], self.offset)


def fit(
    trunk: Trunk,
    judgements: Sequence[Judgement],
    settings: RewardFit,
    generator: torch.Generator,
    known: Sequence[Judgement] | None = None,
) -> Fit:
    """Train the reward adapter from where it stands; `known` is all that judgements were drawn from."""
    weights = weigh(judgements, settings, known)
    offset = balance(judgements, weights) if settings.class_balance else 0.0
    parameters = list(trunk.parameters("reward").values())
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    loss = torch.tensor(0.0)
    for _ in range(settings.epochs):
        order = torch.randperm(len(judgements), generator=generator)
        losses = [
            _step(trunk, optimizer, [judgements[int(i)] for i in rows], weights[rows], offset)
            for rows in order.split(settings.batch_size)
        ]
        loss = torch.stack(losses).mean()
    return Fit(float(loss), offset)


def balance(judgements: Sequence[Judgement], weights: Tensor) -> float:
    """Return the weighted log-odds of a thumb up among judgements (N,).

    As the offset of a logit it says how many thumbs are up, and leaves to the reward what tells good
    from bad: logit adjustment (Menon et al. 2021, arXiv 2007.07314, eq. 10).
    """
    ups = downs = 0.0
    for each, weight in zip(judgements, weights.tolist(), strict=True):
        if isinstance(each, Thumb):
            ups, downs = ups + weight * each.is_up, downs + weight * (not each.is_up)
    return log_odds(ups, downs)


def loss_of(judgements: Sequence[Judgement], rewards: Tensor, offset: float) -> Tensor:
    """Return each judgement's loss (N,), from the rewards of its `replies_of`, in their order.

    A thumb: binary cross-entropy of sigmoid(reward + offset). A comparison: -log sigmoid(better - worse)
    (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
    """
    losses, at = [], 0
    for each in judgements:
        if isinstance(each, Thumb):
            logit = rewards[at] + offset
            losses.append(F.softplus(-logit if each.is_up else logit))
            at += 1
        else:
            losses.append(F.softplus(rewards[at + 1] - rewards[at]))
            at += 2
    return torch.stack(losses)


def replies_of(judgements: Sequence[Judgement]) -> list[Pair]:
    """Return the replies that are judged: a thumb's one, a comparison's better and worse one."""
    replies: list[Pair] = []
    for each in judgements:
        if isinstance(each, Thumb):
            replies.append((each.prompt, each.response))
        else:
            replies += [(each.prompt, each.better), (each.prompt, each.worse)]
    return replies


def _step(
    trunk: Trunk,
    optimizer: torch.optim.Optimizer,
    judgements: Sequence[Judgement],
    weights: Tensor,
    offset: float,
) -> Tensor:
    """Descend once on one batch."""
    losses = loss_of(judgements, _rewards(trunk, replies_of(judgements)), offset)
    loss = (losses * weights.to(trunk.device)).mean()
    optimizer.zero_grad()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trunk.workers.descend(loss, parameters)
    if not torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
        raise NotFinite("the reward model's gradient is not finite")
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def score(trunk: Trunk, replies: Sequence[Pair]) -> Tensor:
    """Return the reward of each reply (N,), in logits, on the CPU."""
    return _rewards(trunk, replies).cpu()


def try_on(trunk: Trunk, judgements: Sequence[Judgement], offset: float = 0.0) -> Trial:
    """Return what the reward model says of judgements; held out if it was not fitted on them."""
    thumbs = tuple(j for j in judgements if isinstance(j, Thumb))
    pairs = tuple(j for j in judgements if isinstance(j, Comparison))
    rewards = score(trunk, replies_of([*thumbs, *pairs])).tolist()
    better, worse = rewards[len(thumbs) :: 2], rewards[len(thumbs) + 1 :: 2]
    return Trial(
        thumbs,
        tuple(rewards[: len(thumbs)]),
        pairs,
        tuple(b - w for b, w in zip(better, worse, strict=True)),
        offset,
    )


def cross_fit(
    trunk: Trunk,
    judgements: Sequence[Judgement],
    settings: RewardFit,
    generator: torch.Generator,
) -> list[Trial]:
    """Try what a fit learns where there is no parent to try: users in folds, each held out once.

    Leaves the reward adapter as it was.
    """
    start = trunk.snapshot("reward")
    folds = user_folds(judgements)
    trials = []
    for held_out in range(FOLDS):
        rest = [j for j, fold in zip(judgements, folds, strict=True) if fold != held_out]
        unseen = [j for j, fold in zip(judgements, folds, strict=True) if fold == held_out]
        if rest and unseen:
            fitted = fit(trunk, rest, settings, generator, judgements)
            trials.append(try_on(trunk, unseen, fitted.offset))
            trunk.restore("reward", start)
    return trials


def user_folds(judgements: Sequence[Judgement]) -> list[int]:
    """Split judgements in folds, users kept whole; of too few users the replies are."""
    users = sorted({j.user for j in judgements}, key=lambda user: sha256(user.encode()).digest())
    if len(users) < FOLDS:
        rank = {name: i for i, name in enumerate(dict.fromkeys(j.response_id for j in judgements))}
        return [rank[j.response_id] % FOLDS for j in judgements]
    fold = {user: i % FOLDS for i, user in enumerate(users)}
    return [fold[j.user] for j in judgements]


def _rewards(trunk: Trunk, replies: Sequence[Pair]) -> Tensor:
    """Return the reward of each reply (N,): what the trunk answers to the question after it."""
    asked = [(prompt, (*response, *trunk.verdict.prompt)) for prompt, response in replies]
    rewards = torch.zeros(len(asked), device=trunk.device)
    for rows, batch in batches_of(trunk, asked):
        rewards = rewards.index_copy(0, rows.to(trunk.device), trunk.rewards(batch))
    return trunk.workers.join(rewards)
