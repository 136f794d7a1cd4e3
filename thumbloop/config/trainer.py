"""Settings of `python -m trainer`."""

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from thumbloop.config.shared import Metrics, Rewards, Section, ThumbloopSettings, thumbs_alone


class TrainerEndpoint(Metrics):
    """The trainer's own Prometheus endpoint."""

    port: int = Field(9465, ge=0, le=65535)
    """TCP port; 0 takes a free one and prints it."""


class Round(Section):
    """When the trainer learns, and from what."""

    first_feedback: int = Field(80, ge=1)
    """New thumbs and preferences that start a round on a version without a reward model: to prove that they can
    be learned from takes more of them than to go on."""
    min_feedback: int = Field(32, ge=1)
    """New thumbs and preferences that start any later round."""
    max_rollouts: int = Field(256, ge=1)
    """Most candidates in one PPO batch, newest first."""
    min_rollouts: int = Field(64, ge=1)
    """Fewest candidates in one PPO batch; with fewer the round waits."""
    max_staleness: int = Field(2, ge=0, le=4)
    """Versions behind the current one that a rollout may be; older ones are dropped and counted."""
    candidates: Literal["all", "chosen"] = "all"
    """Which candidates of a reply train the policy; chosen ones alone are no sample of it."""
    pruned: Literal["exclude", "bootstrap", "survivors"] = "survivors"
    """Groups that lost candidates to pruning: left out; whole, aborted ones bootstrapped by the critic; or
    without those that were aborted, which is biased and learns fastest."""
    max_user_feedback: int = Field(256, ge=1)
    """New thumbs and preferences of one user in a round, at most, newest first; the rest waits."""
    max_user_factor: float = Field(2.0, ge=1)
    """Thumbs and preferences that one user has in all that is learned from and replayed, at most, in multiples of the
    average user's; what is beyond waits until the others have caught up. With fewer than 10 users nobody is held
    back."""
    max_older_feedback: int = Field(10_000, ge=1)
    """Thumbs, and as many preferences, that were learned from before and are read again to be replayed, at most,
    newest first; new ones are read all."""
    max_feedback_age_s: float | None = Field(None, gt=0)
    """Age from which feedback teaches nothing any more, seconds; absent: it never grows too old."""
    poll_interval_s: float = Field(0.5, gt=0)
    """Seconds between looks at the store; after one that took long more, 20 times as long as it took, but at most
    60 for that."""
    retry_interval_s: float = Field(30.0, gt=0)
    """Seconds from a round that could not be recorded, as disk or database did not take it, to the next try."""
    rebuild_tainted: bool = False
    """Where the current version, or an ancestor, learned from a user's data that was erased since: learn the next one
    anew, from the last version before those and from all that is left since; else from the current one, as ever."""
    max_rounds: int | None = Field(None, ge=1)
    """Rounds after which the trainer stops; absent: it goes on."""

    def oldest_feedback(self, now: float) -> float:
        """Return from when on feedback still teaches; both in unix seconds."""
        return now - (self.max_feedback_age_s or math.inf)

    @model_validator(mode="after")
    def _can_start(self) -> Self:
        if self.max_rollouts < self.min_rollouts:
            raise ValueError("with max_rollouts below min_rollouts no round could ever start")
        return self


class Lora(Section):
    """Shape of both adapters."""

    rank: int = Field(16, ge=1)
    """Rank of every module's update."""
    alpha: float = Field(32.0, gt=0)
    """Scale: the update is alpha / rank * B A."""


class RewardFit(Section):
    """Fitting the reward model to thumbs."""

    learning_rate: float = Field(2e-3, gt=0)
    """Adam's step size."""
    epochs: int = Field(2, ge=1)
    """Passes over new and replayed feedback."""
    batch_size: int = Field(8, ge=1)
    """Replies per optimizer step."""
    replay_share: float = Field(1.0, ge=0)
    """Replayed older thumbs per new one, at most."""
    propensity_weights: bool = True
    """Weigh thumbs by the inverse of the propensity with which their reply was shown."""
    max_weight: float = Field(4.0, ge=1)
    """Clip of the self-normalised inverse-propensity weight."""
    preference_weight: float = Field(1.0, ge=0)
    """Weight of a preference, beside 1 of a thumb; 0 turns preferences off."""
    class_balance: bool = False
    """Fit with an offset of the thumbs' own log-odds, so that the reward tells good from bad rather than
    how many thumbs are up."""
    max_user_share: float = Field(0.1, gt=0, le=1)
    """Largest share of the total weight that one user may have."""
    max_user_factor: float = Field(1.25, ge=1)
    """Largest weight that one user may have over all that is learned from and replayed, in multiples of the average
    user's. With fewer than 10 users there is no such limit."""

    @property
    def uses_preferences(self) -> bool:
        """Say whether preferences teach anything."""
        return self.preference_weight > 0


class Ppo(Section):
    """The policy update."""

    learning_rate: float = Field(3e-3, gt=0)
    """Adam's step size."""
    epochs: int = Field(2, ge=1)
    """Passes over the batch."""
    minibatch_size: int = Field(32, ge=1)
    """Rollouts per optimizer step."""
    minibatches: Literal["prompts", "rollouts"] = "prompts"
    """What is put in random order: prompts, their rollouts next to each other, so that most prompts are computed once
    a step, or rollouts."""
    clip: float = Field(0.2, gt=0, lt=1)
    """Clip of the probability ratio."""
    value_clip: float = Field(0.2, gt=0)
    """Clip of the value's change, reward units."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE lambda of the policy's advantages."""
    advantage_shift: float = Field(0.8, ge=0)
    """Added to the whitened advantages: praise weighs more than blame, which frays the language."""
    kl_coef: float = Field(0.1, ge=0)
    """Price of one nat of divergence from the reference, normalised reward units."""
    kl_loss_coef: float = Field(0.1, ge=0)
    """Weight in the loss of the exact divergence from the reference in each state, per nat: keeps words
    that were not sampled where the reference has them."""
    kl_coef_gain: float = Field(0.0, ge=0)
    """How strongly the price follows reference_kl_target from round to round; 0 keeps it."""
    reference_kl_target: float = Field(6.0, gt=0)
    """Divergence from the reference that the price is steered to, nats per reply."""
    target_kl: float = Field(0.05, gt=0)
    """Epochs stop when approx_kl passes 1.5 times this, nats per token."""
    max_importance_weight: float = Field(2.0, ge=1)
    """Truncation of the behaviour correction."""
    min_reward_std: float = Field(0.3, gt=0, le=0.5)
    """Spread of the predicted thumb-up probabilities under which advantages and steps shrink with it."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Taken from the normalised reward of a reply that reached its token limit."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip of the gradient's norm."""


class Gate(Section):
    """What a round has to show before it is published."""

    enabled: bool = True
    """Off: whatever is finite is published; for experiments."""
    error_rate: float = Field(0.02, gt=0, lt=1)
    """Chance that thumbs that mean nothing ever publish a version, over all rounds from one that has no reward
    model."""
    min_auroc_bound: float = Field(0.5, ge=0, le=1)
    """The lower confidence bound of the held-out AUROC has to be above this."""
    harm_confidence: float = Field(0.99, gt=0.5, lt=1)
    """One-sided level at which evidence of harm stops a round."""
    min_effective_share: float = Field(0.1, ge=0, lt=1)
    """Share of the rated replies that have to speak for the child, or their estimates say nothing."""
    max_kl: float = Field(20.0, gt=0)
    """Largest divergence from the reference, nats per reply."""
    max_update_norm: float = Field(100.0, gt=0)
    """Largest Frobenius norm of any module's update."""
    min_entropy_share: float = Field(0.2, ge=0, lt=1)
    """Entropy that has to be left of the reference's, in the states met."""
    max_repetition_rise: float = Field(0.1, gt=0, le=1)
    """Largest rise of the share of repeated word pairs (bigrams of tokens) over the base model's."""
    max_unended_rise: float = Field(0.1, gt=0, le=1)
    """Largest rise of the share of replies that reach their token limit over the base model's."""
    max_length_drift: float = Field(1.25, gt=1)
    """Factor by which replies may grow or shrink; beyond it the thumbs themselves have to ask for it."""
    max_unwished_step: float = Field(1.05, gt=1)
    """Factor by which replies may grow or shrink in one round where thumbs clearly say the opposite, unless
    their reward model expects more thumbs up and they themselves no fewer."""
    length_confidence: float = Field(0.95, gt=0.5, lt=1)
    """One-sided level at which thumbs have to rise with the length that replies drift to."""


class Supervised(Section):
    """The supervised warm start: replies with a thumb up are imitated before anything else is tried."""

    enabled: bool = False
    """Do it in the first round, from version 0."""
    learning_rate: float = Field(5e-4, gt=0)
    """Adam's step size."""
    epochs: int = Field(1, ge=1)
    """Passes over the replies."""
    batch_size: int = Field(16, ge=1)
    """Replies per optimizer step."""


class Resources(Section):
    """What the trainer may take of the machine."""

    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Trunk weights; auto is float32 on a CPU and bfloat16 on a GPU."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens computed at a time, which bounds the memory of activations, in the fit of the reward model together with
    reward.batch_size; absent: 512 on a CPU, 16384 on a GPU. What is learned does not depend on it, but for rounding."""
    gradient_checkpointing: bool = False
    """Compute activations again for the gradient instead of keeping them: a third slower, for a model that does not
    fit."""
    processes: int | None = Field(None, ge=1)
    """Processes that compute a round together, each on a GPU of its own; absent: one for each GPU that is visible, one
    where there is none."""
    threads: int = Field(1, ge=1)
    """CPU threads of each process."""
    max_share: float = Field(1.0, gt=0, le=1)
    """Share of the time in which it may compute; it rests after each batch. With one thread beside a server on the same
    cores, serving loses at most this share of one core."""
    nice: int = Field(10, ge=0, le=19)
    """Niceness, so that serving goes first."""


class TrainerConfig(ThumbloopSettings):
    """Settings of `python -m trainer`."""

    model_config = SettingsConfigDict(env_prefix="THUMBLOOP_TRAINER_")

    metrics: TrainerEndpoint = TrainerEndpoint()
    """The Prometheus endpoint."""
    tensorboard: Path | None = None
    """Folder for TensorBoard scalars; absent: `tensorboard` in the state folder."""
    round: Round = Round()
    """When the trainer learns, and from what."""
    lora: Lora = Lora()
    """Shape of both adapters."""
    reward: RewardFit = RewardFit()
    """Fitting the reward model."""
    rewards: Rewards = Field(default_factory=thumbs_alone)
    """What the policy is trained to reach: as `rewards` of the server. A classifier is not run again, what
    the server logged under its name is taken; whole candidates without it are left out."""
    supervised: Supervised = Supervised()
    """The supervised warm start."""
    objective: Literal["ppo"] = "ppo"
    """What moves the policy."""
    ppo: Ppo = Ppo()
    """The policy update."""
    gate: Gate = Gate()
    """What a round has to show before it is published."""
    resources: Resources = Resources()
    """What the trainer may take of the machine."""
