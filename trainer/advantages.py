"""From rewards to advantages: scores, KL penalty, a critic that has not seen the answers, GAE."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from thumbloop.config.trainer import Ppo
from trainer import critic, ppo
from trainer.critic import ValueHead
from trainer.measure import Fixed
from trainer.rollouts import Rollout


class Scores(NamedTuple):
    """What a batch's replies are worth to PPO."""

    scores: Tensor  # (B,)
    signal: float  # how much the replies differ, in [0, 1]: 1 where it is enough to learn from


class Estimate(NamedTuple):
    """What the critic makes of a batch."""

    advantages: Tensor  # (B, T), whitened, then shifted
    explained_variance: float  # of prompts the critic was not fitted on
    head: ValueHead  # fitted on all


def estimate(
    head: ValueHead,
    rollouts: Sequence[Rollout],
    fixed: Fixed,
    scores: Tensor,
    settings: Ppo,
    *,
    kl_coef: float,
    generator: torch.Generator,
) -> Estimate:
    """Return advantages for scores (B,), and the critic fitted to them.

    `settings.advantage_shift` lowers the baseline below the mean: what was said is held on to a
    little, and the mass that blame sets free goes to other replies, not to nonsense (Arnal et al.
    2025, arXiv 2506.20520). On the policy's own samples it changes the gradient's variance only.

    Each prompt's values come from a critic that was not fitted on it: one that has seen the returns
    explains away what the policy is to learn from.
    """
    mask = fixed.mask
    rewards = ppo.shaped_rewards(
        scores, fixed.prox_logprobs, fixed.ref_logprobs, mask, kl_coef=kl_coef
    )
    truncated = torch.tensor([not r.is_finished for r in rollouts], device=mask.device)

    def gae(values: Tensor, lam: float) -> ppo.Gae:
        bootstrap = torch.where(truncated, last_value(values, mask), 0.0)
        return ppo.gae(rewards, values[:, :-1], bootstrap, mask, gamma=1.0, lam=lam)

    with torch.no_grad():
        returns = gae(head(fixed.hidden), lam=1.0).returns
    fit = partial(critic.fit, head, clip=settings.value_clip, generator=generator)
    states, folds = fixed.hidden[:, :-1], prompt_folds(rollouts).to(mask.device)
    heads = [fit(states[folds != f], returns[folds != f], mask[folds != f]) for f in (0, 1)]
    values = critic.cross_fitted_values(heads, folds, fixed.hidden)
    advantages = ppo.whiten(gae(values, settings.lam).advantages, mask)
    return Estimate(
        advantages=advantages + settings.advantage_shift,
        explained_variance=float(ppo.explained_variance(values[:, :-1], returns, mask)),
        head=fit(states, returns, mask),
    )


def normalise(rewards: Tensor, rollouts: Sequence[Rollout], settings: Ppo) -> Scores:
    """Turn rewards (B,) into scores: probabilities of a thumb up, centred, at most of variance 1.

    Probabilities saturate: once nearly all replies please, more reward cannot buy more divergence
    (bounded rewards: arXiv 2502.18770). Differences that are small are not blown up. A missing end
    costs its penalty. A truncated rollout has no score; it is 0, and its bootstrap stands for what
    would have come.
    """
    finished = torch.tensor([r.is_finished for r in rollouts])
    missing_eos = torch.tensor([not r.has_eos for r in rollouts])
    if not finished.any():
        return Scores(torch.zeros_like(rewards), 0.0)
    probabilities = rewards.sigmoid()
    known = probabilities[finished]
    spread = known.std(correction=0)
    scores = (probabilities - known.mean()) / spread.clamp(min=settings.min_reward_std)
    scores = scores - settings.missing_eos_penalty * missing_eos
    return Scores(
        scores.masked_fill(~finished, 0.0), min(1.0, float(spread) / settings.min_reward_std)
    )


def last_value(values: Tensor, mask: Tensor) -> Tensor:
    """Return the value (B,) of the state after each row's last token, from values (B, T + 1)."""
    return values.gather(1, mask.sum(dim=1, keepdim=True)).squeeze(1)


def prompt_folds(rollouts: Sequence[Rollout]) -> Tensor:
    """Split rollouts in two folds (B,), all of a prompt in one."""
    rank = {prompt: i for i, prompt in enumerate(sorted({r.prompt for r in rollouts}))}
    return torch.tensor([rank[r.prompt] % 2 for r in rollouts])
